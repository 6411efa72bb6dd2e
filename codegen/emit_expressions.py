"""Expressions: each is computed once where it can be shared, and loads only where its guards allow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from stitch import dtypes
from stitch.codegen import emit_primitives as primitives
from stitch.codegen import emit_storage as storage
from stitch.codegen.emit_math import looked_up
from stitch.codegen.emit_memory import Guard, Memory
from stitch.codegen.emit_rules import multiply_add
from stitch.codegen.emit_values import Operations, Value, literal
from stitch.codegen.loops import Apply, Buffer, Expr, Guarded, Literal, Lookup, Position, Read, Use


class Expressions:
    """The values of expressions at the point where the emitter stands, and what is known of them there: an expression
    is known in the body where it was computed and in what is inside, until something stores what was read for it."""

    def __init__(self, o: Operations, m: Memory) -> None:
        self.o, self.m = o, m
        self.memo: list[dict[tuple[Expr, Guard], tuple[Value, frozenset[Buffer]]]] = [{}]

    @contextmanager
    def inside(self) -> Iterator[None]:
        """A body, after which what was computed in it is forgotten."""
        self.memo.append({})
        yield
        self.memo.pop()

    def forget(self, buffers: Iterable[Buffer]) -> None:
        """Forgets expressions that read what has been, or will be, stored."""
        gone = set(buffers)
        for frame in self.memo:
            for key in [k for k, (_, read) in frame.items() if read & gone]:
                del frame[key]

    def value(self, e: Expr) -> Value:
        """The value of an expression; a shared object is computed once."""
        return self._visit(e)[0]

    def _known(self, e: Expr) -> tuple[Value, frozenset[Buffer]] | None:
        key = (e, self.m.guard)
        for frame in reversed(self.memo):
            if key in frame:
                return frame[key]
        return None

    def _visit(self, e: Expr) -> tuple[Value, frozenset[Buffer]]:
        """The value, and the buffers that were read for it. Without recursion: chains of operators may be long."""
        stack = [e]
        while stack:
            x = stack[-1]
            if self._known(x) is None:
                waiting = [c for c in _operands(x) if self._known(c) is None]
                if waiting:
                    stack += reversed(waiting)
                    continue
                self.memo[-1][x, self.m.guard] = self._computed(x)
            stack.pop()
        found = self._known(e)
        assert found is not None
        return found

    def _computed(self, e: Expr) -> tuple[Value, frozenset[Buffer]]:
        none: frozenset[Buffer] = frozenset()
        match e:
            case Literal():
                return literal(e.value, e.dtype), none
            case Read():
                return self.m.load(e.buffer, e.index), frozenset([e.buffer])
            case Use():
                return self.m.locals[e.local], none
            case Position():
                return self.m.position(e.index), none
            case Guarded():
                return self._guarded(e)
            case Apply():
                return self._applied(e)
            case Lookup():
                at, read = self._visit(e.at)
                return looked_up(self.o, e.table, at, e.dtype), read

    def _applied(self, e: Apply) -> tuple[Value, frozenset[Buffer]]:
        if e.prim == "cast" and e.dtype == dtypes.INT32 and isinstance(e.args[0], Position):
            return self.m.position(e.args[0].index, e.dtype), frozenset()
        operands = _operands(e)
        found = [self._visit(a) for a in operands]
        values = [v for v, _ in found]
        fused = operands is not e.args
        value = self.o.multiply_add(*values) if fused else primitives.apply(self.o, e.prim, values, e.dtype)
        if e.most is not None:
            self.o.most[value] = e.most
        if e.rounded is not None:
            bits = storage.to_memory(self.o, value, e.rounded, self.m.has_half)
            value = storage.from_memory(self.o, bits, e.rounded)
        return value, frozenset().union(*(read for _, read in found))

    def _guarded(self, e: Guarded) -> tuple[Value, frozenset[Buffer]]:
        """The value is computed everywhere, but loads only where the guard allows; then one of the two is chosen. What
        is loaded elsewhere is zeros, so that there is nothing to choose if zero is the other, as for padding."""
        condition = self.m.within(e.bounds)
        if condition.parts == ("false",):
            return literal(e.otherwise.value, e.dtype), frozenset()
        saved, self.m.guard = self.m.guard, self.m.narrowed(condition)
        value, read = self._visit(e.value)
        self.m.guard = saved
        if isinstance(e.value, Read) and _is_zero(e.otherwise) and (value.varying or not condition.varying):
            return value, read
        return self.o.select(condition, value, literal(e.otherwise.value, e.dtype)), read


def _operands(e: Expr) -> tuple[Expr, ...]:
    """What a primitive is computed from: of a contracted sum, the product's factors."""
    if isinstance(e, Lookup):
        return (e.at,)
    return (multiply_add(e.prim, e.args) or e.args) if isinstance(e, Apply) else ()


def _is_zero(e: Literal) -> bool:
    return e.value == 0 and math.copysign(1, e.value) == 1
