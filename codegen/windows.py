"""Loops around windows, ordered so that the weights stay in registers and neighbouring points share what they load.

    before:  for column { vector x4 channel { for taps { sum += x[column + tap, channel] · w[tap, channel] } … } }
    after:   vector channel { for column, 4 at a time { for taps, written out { … } … } }

A depthwise convolution does one multiply-add for each number it loads of the image, and, if nothing is done about it,
for each number of the weights: two loads, where a core does one of a whole vector per cycle. With lanes outside, the
weights of these channels do not change in the loop over columns, and the columns that are written out one after the
other read most of the image's numbers together. As many vectors side by side as usual would need as many registers for
the weights: columns are independent work enough.

No sum changes: each is over the same taps in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace

from stitch import access
from stitch.access import Axis
from stitch.codegen.contract import ALIAS
from stitch.codegen.emit_rules import stored_in
from stitch.codegen.loops import (
    Buffer,
    Clip,
    Contract,
    Expr,
    Gate,
    Guarded,
    Loop,
    Phase,
    Read,
    Stmt,
    Store,
    Transpose,
    Use,
    children,
    expressions,
    walk,
)
from stitch.codegen.lower import Rewriter

POINTS = 4
"""Neighbouring points that are written out one after the other."""

TAPS = 27
"""Taps up to which a window is written out: their weights are about as many as there are registers."""


FEWEST = 8
"""Sets of the first cache that neighbouring points must fall into."""


def ordered(phase: Phase) -> Phase:
    """The phase, its windows with weights in that order."""
    passed: set[Buffer] = set()
    body = _single_lanes(phase.body, passed)
    return replace(phase, body=_body(_without(body, passed - _read(body)) if passed else body))


def _read(body: tuple[Stmt, ...]) -> set[Buffer]:
    found = {e.buffer for s in walk(body) for x in expressions(s) for e in _parts(x) if isinstance(e, Read)}
    for s in walk(body):
        found |= {s.a, s.b} if isinstance(s, Contract) else {s.source} if isinstance(s, Transpose) else set()
    return found


def _without(body: tuple[Stmt, ...], unread: Collection[Buffer]) -> tuple[Stmt, ...]:
    """The statements but for stores that nothing reads."""
    left = (s for s in body if not (isinstance(s, Store) and s.buffer in unread))
    return tuple(replace(s, body=_without(s.body, unread)) if isinstance(s, Loop) else s for s in left)


def _single_lanes(body: tuple[Stmt, ...], passed: set[Buffer]) -> tuple[Stmt, ...]:
    """The statements; what is done lane by lane with the sums of a window goes into the loop over these lanes, so that
    no tile need be between them (it is added to `passed`), and one loop is all that a loop over points has."""
    out: list[Stmt] = []
    for s in body:
        s = replace(s, body=_single_lanes(s.body, passed)) if isinstance(s, Loop) and s.mode == "serial" else s
        if out and (joined := _passed_on(out[-1], s, passed)) is not None:
            out[-1] = joined
        else:
            out.append(s)
    return tuple(out)


def _passed_on(a: Stmt, b: Stmt, passed: set[Buffer]) -> Loop | None:
    """One loop over lanes for two, of which the second reads from a tile what the first has summed there."""
    if not (isinstance(a, Loop) and isinstance(b, Loop)) or (a.mode, b.mode) != ("vector", "vector"):
        return None
    if a.folds or b.folds or (a.axis.extent, a.clip, a.unroll) != (b.axis.extent, b.clip, b.unroll):
        return None
    *sums, last = a.body
    if not sums or not all(isinstance(s, Loop) and s.folds and _taps(s) for s in sums) or not isinstance(last, Store):
        return None
    tile, value, index = last.buffer, last.value, last.index
    if not isinstance(value, Use) or tile.space != "tile" or tile.dtype != value.dtype:
        return None
    place = Rewriter(lambda _, i: i.substitute({b.axis: access.of(a.axis)}))
    if not all(isinstance(s, Store) for s in b.body):
        return None
    moved = [place.stmt(s) for s in b.body]
    reads = [e for s in moved for x in expressions(s) for e in _parts(x) if isinstance(e, Read)]
    stored = {s.buffer for s in moved if isinstance(s, Store)}
    if not all(e.index == index for e in reads if e.buffer is tile) or (stored | {tile}) & _touched(a):
        return None
    if stored & {e.buffer for e in reads} or tile in stored:
        return None
    direct = _Passed(tile, value)
    done = tuple(direct.stmt(s) for s in moved)
    passed.add(tile)
    return replace(a, body=(*a.body, *done))


class _Passed(Rewriter):
    """Reads of a tile as the local that was stored there."""

    def __init__(self, tile: Buffer, value: Use) -> None:
        super().__init__(lambda _, i: i)
        self.tile, self.value = tile, value

    def _expr(self, e: Expr) -> Expr:
        return self.value if isinstance(e, Read) and e.buffer is self.tile else super()._expr(e)


def _body(body: tuple[Stmt, ...]) -> tuple[Stmt, ...]:
    """The statements; what a turned loop was peeled off for the edges goes into the same loop over lanes."""
    turned = [_statement(s) for s in body]
    out: list[Stmt] = []
    for s in turned:
        if out and (joined := _joined(out[-1], s)) is not None:
            out[-1] = joined
        else:
            out.append(s)
    return tuple(out)


def _joined(a: Stmt, b: Stmt) -> Loop | None:
    """One loop over lanes for what two did one after the other, if one of them is over windows."""
    if not (isinstance(a, Loop) and isinstance(b, Loop)) or a.mode != "vector" or a.folds or b.folds:
        return None
    if b.mode != "vector" or (a.axis, a.clip) != (b.axis, b.clip) or not (_has_points(a) or _has_points(b)):
        return None
    if _touched(a) & stored_in(b.body) or stored_in(a.body) & _touched(b):
        return None
    return replace(a, body=(*_single(a), *_single(b)), unroll=1)


def _has_points(lanes: Loop) -> bool:
    return any(isinstance(s, Loop) and s.unroll == POINTS for s in walk(lanes.body))


def _touched(lanes: Loop) -> set[Buffer]:
    """What is read in a loop."""
    return {e.buffer for s in walk((lanes,)) for x in expressions(s) for e in _parts(x) if isinstance(e, Read)}


def _single(lanes: Loop) -> tuple[Stmt, ...]:
    """The body, with the windows of single points written out."""
    return tuple(_written_out(s) if isinstance(s, Loop) and s.folds and _taps(s) else s for s in lanes.body)


def _statement(s: Stmt) -> Stmt:
    match s:
        case Loop(mode="vector") if not s.folds:
            body = tuple(_points(t, s.axis) for t in s.body)
            return replace(s, body=body, unroll=1) if body != s.body else s
        case Loop(body=(Loop(mode="vector") as lanes,)) if not (s.folds or lanes.folds or s.axis in _outer(lanes)):
            turned = _points(replace(s, body=lanes.body), lanes.axis)
            if isinstance(turned, Loop) and turned.unroll == POINTS and not _crowded(turned, lanes.axis):
                return replace(lanes, body=(turned,), unroll=1)
            return replace(s, body=(_statement(lanes),))
        case Loop(mode="serial"):
            return replace(s, body=_body(s.body))
        case _:
            return s


def _points(s: Stmt, lanes: Axis) -> Stmt:
    """A loop inside of one over lanes: the innermost that is no window goes several points at a time, if it has one."""
    if not isinstance(s, Loop) or s.folds:
        return s
    if any(isinstance(t, Loop) and not t.folds for t in s.body):
        body = tuple(_points(t, lanes) for t in s.body)
        return replace(s, body=_single(replace(s, body=body))) if body != s.body else s
    windows = [t for t in s.body if isinstance(t, Loop)]
    if len(windows) != 1 or not _is_weighted(windows[0], s.axis, lanes):
        return s
    body = tuple(_written_out(t) if t is windows[0] else t for t in s.body)
    return replace(s, body=body, unroll=POINTS)


def _crowded(points: Loop, lanes: Axis) -> bool:
    """Whether neighbouring points fall into so few sets of the first cache that they would drive each other out, lane
    by lane: where there are 256 channels, or 512. One point after the other with all its lanes is quicker then."""
    reads = [e for s in walk(points.body) for x in expressions(s) for e in _parts(x) if isinstance(e, Read)]
    steps = [
        (e.index.coefficient(points.axis), e.buffer.dtype.itemsize)
        for e in reads
        if e.buffer.space == "global" and e.index.coefficient(lanes) != 0
    ]
    return any(isinstance(c, int) and c != 0 and math.gcd(c * size, ALIAS) > ALIAS // FEWEST for c, size in steps)


def _is_weighted(window: Loop, point: Axis, lanes: Axis) -> bool:
    """Whether a sum over a small window reads, for each tap, something that is the same at all points, and nothing that
    is only allowed at some."""
    taps = _taps(window)
    if taps is None:
        return False
    reads = [e for s in walk((window,)) for x in expressions(s) for e in _parts(x)]
    if any(isinstance(e, Guarded) and any(b.index.coefficient(point) != 0 for b in e.bounds) for e in reads):
        return False
    return any(
        isinstance(e, Read)
        and e.index.coefficient(point) == 0
        and e.index.coefficient(lanes) != 0
        and all(e.index.coefficient(a) != 0 for a in taps)
        for e in reads
    )


def _taps(window: Loop) -> tuple[Axis, ...] | None:
    """The axes of a window that is a nest of short loops, and nothing else."""
    axes: list[Axis] = []
    count, s = 1, window
    while True:
        if s.clip is not None or not isinstance(s.axis.extent, int) or s.mode != "serial" or not s.folds:
            return None
        axes.append(s.axis)
        count *= s.axis.extent
        if not s.body:
            return tuple(axes) if 1 < count <= TAPS else None
        if len(s.body) != 1 or not isinstance(s.body[0], Loop):
            return None
        s = s.body[0]


def _written_out(s: Loop) -> Loop:
    assert isinstance(s.axis.extent, int)
    return replace(s, body=tuple(_written_out(t) for t in s.body if isinstance(t, Loop)), unroll=s.axis.extent)


def _outer(loop: Loop) -> Collection[Axis]:
    """The axes around a loop that decide how often it runs."""
    match loop.clip:
        case Clip():
            return (loop.clip.outer,)
        case Gate():
            return tuple(v for b in loop.clip.bounds for v, _ in b.index.terms if isinstance(v, Axis))
        case _:
            return ()


def _parts(e: Expr) -> Iterator[Expr]:
    seen: set[int] = set()
    stack = [e]
    while stack:
        x = stack.pop()
        if id(x) not in seen:
            seen.add(id(x))
            stack += children(x)
            yield x
