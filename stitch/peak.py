"""How much memory a compiled model needs beside its inputs and outputs, for `explain()`.

    weights    constants, packed for matmuls or as they are; once for all runs; mapped, if they come from the cache
    arena      the values between kernels, at places that liveness allows
    scratch    of each thread: tiles that stay in its caches
    frames     values that pass between native code and numpy, each in memory of its own until the run ends

Native steps run one after the other and share one block of memory. `codegen.arena` plans it, `record` keeps what is of
interest in an artifact, and `Peak` says what it comes to at given sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Size = int | str  # bytes, or the text of an expression over the model's symbols
Record = Mapping[str, Any]


def step(phases: Sequence[str], values: Sequence[Record], arena: Size, scratch: Size) -> dict[str, Any]:
    """The record of one native step. `phases`: the kernel of each; `values`: see `value`."""
    return {"phases": list(phases), "values": list(values), "arena": arena, "scratch": scratch}


def value(name: str, size: Size, first: int, last: int, replaces: str = "") -> dict[str, Any]:
    """The record of a value that lives from phase `first` to phase `last`, in the place of `replaces`, if given."""
    return {"value": name, "bytes": size, "first": first, "last": last, "replaces": replaces}


def frame(name: str, size: Size) -> dict[str, Any]:
    """The record of a value between native code and numpy."""
    return {"value": name, "bytes": size}


def sized(memory: Record, size: Callable[[Size], Size]) -> dict[str, Any]:
    """The record of a model with other sizes."""
    steps = [
        step(s["phases"], [{**v, "bytes": size(v["bytes"])} for v in s["values"]], size(s["arena"]), size(s["scratch"]))
        for s in memory["steps"]
    ]
    frames = [{**f, "bytes": size(f["bytes"])} for f in memory.get("frames", ())]
    return {**memory, "steps": steps, "frames": frames}


@dataclass(frozen=True)
class Peak:
    """Bytes, at sizes that are known. `least`: the most that lives at once, which no plan can do without; `held`: what
    lives in the phase where that is, the largest first, each with the kernels that it lives from and to; `in_place`:
    how many results take the place of an operand, which then does not count beside them."""

    arena: int
    scratch: int
    least: int
    without_reuse: int
    kernel: str
    held: tuple[tuple[str, int, str, str], ...]
    in_place: int

    def to_dict(self) -> dict[str, Any]:
        held = [dict(zip(("value", "bytes", "from", "to"), row, strict=True)) for row in self.held]
        return {**vars(self), "held": held}


def peak(memory: Record) -> Peak | None:
    """Of the step that needs the largest arena; None if there is none, or a size is not known."""
    numbers = [x for s in memory["steps"] for x in (s["arena"], s["scratch"], *(v["bytes"] for v in s["values"]))]
    if not memory["steps"] or not all(isinstance(n, int) for n in numbers):
        return None
    most = max(memory["steps"], key=lambda s: s["arena"])
    live: list[int] = [0] * max(len(most["phases"]), 1)
    given = {v["replaces"]: v["first"] for v in most["values"] if v["replaces"]}
    spans = [(v, v["first"], v["last"] - (given.get(v["value"]) == v["last"])) for v in most["values"]]
    for v, first, last in spans:
        for t in range(first, last + 1):
            live[t] += v["bytes"]
    at = live.index(max(live))
    names = most["phases"] or [""]
    held = sorted((v for v, first, last in spans if first <= at <= last), key=lambda v: -v["bytes"])
    return Peak(
        arena=most["arena"],
        scratch=max(s["scratch"] for s in memory["steps"]),
        least=live[at],
        without_reuse=sum(v["bytes"] for v in most["values"]),
        kernel=names[at],
        held=tuple((v["value"], v["bytes"], names[v["first"]], names[v["last"]]) for v in held),
        in_place=sum(1 for v in most["values"] if v["replaces"]),
    )
