"""Chains of memory-bound operators, one graph each, in stitch and its peers: python -m benchmarks.chains"""
