"""Where each piece of a model runs: algorithms over a frozen `Problem`, which knows seconds and bytes and nothing else.

problem      what there is to place, and what a placement costs
throughput   consecutive stages on sets of cores, the slowest stage as fast as can be: exact
pipeit       the same by Pipe-it's heuristic, to compare
latency      one input as early as can be: a minimum cut for two devices, else dynamic programming
memory       the same within limits of memory
split        one operator over several devices
"""
