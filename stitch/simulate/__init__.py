"""What a placement would do on a machine that is not here: stages, queues and links as discrete events.

events     the simulator
gantt      its trace as a picture, SVG or plain text
work       what a kernel computes and moves, and how long that takes a cluster with known rates
team       kernels that clusters share
command    `stitch simulate`
"""
