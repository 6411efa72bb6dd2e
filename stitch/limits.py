"""How many threads a model may use so that all that it takes stays within a limit."""

from __future__ import annotations

import json
from collections.abc import Mapping

from stitch.errors import MemoryLimit
from stitch.plan import Artifact, Port, np_dtype
from stitch.sizes import checked


def bytes_of(artifact: Artifact, sizes: Mapping[str, int], threads: int) -> int:
    """What a model takes while it runs, at these extents of its symbols (others are 1): weights, the arena, scratch of
    each thread, what passes between native code and numpy, inputs and outputs. Not counted are what functions of numpy
    take for themselves, and results of earlier runs that somebody still has."""
    known = {name: sizes.get(name, 1) for name in artifact.symbols}
    memory = json.loads(artifact.report["memory"])
    steps = ((_number(s["arena"], known), _number(s["scratch"], known)) for s in memory["steps"])
    arena = max((own + threads * scratch for own, scratch in steps), default=0)  # all steps have the same block
    frames = sum(_number(f["bytes"], known) for f in memory["frames"])
    ports = sum(_port(p, known) for p in (*artifact.inputs, *artifact.outputs))
    return int(memoryview(artifact.constants).nbytes) + arena + frames + ports


def within(artifact: Artifact, limit: float, sizes: Mapping[str, int], cores: int) -> int:
    """The largest team, up to one thread a core. Raises MemoryLimit with the least bytes that would do,
    and StitchError for sizes that are none of the model's."""
    sizes = checked(sizes, {artifact.symbols[s] for s, _, _ in artifact.bindings})
    for threads in range(cores, 0, -1):
        if bytes_of(artifact, sizes, threads) <= limit:
            return threads
    raise MemoryLimit(limits={"cpu": float(limit)}, smallest={"cpu": bytes_of(artifact, sizes, 1)}, exact=True)


def _port(port: Port, known: Mapping[str, int]) -> int:
    if port.dtype == "object":
        return 0
    size = np_dtype(port.dtype).itemsize
    for d in port.shape:
        size *= _number(d, known)
    return size


def _number(size: int | str, known: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    from stitch import dims

    return dims.evaluate(dims.parse(size), known)
