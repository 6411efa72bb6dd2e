"""The shapes of a model's inputs: what its file says of them, made into dims that can be read off arrays.

ONNX gives each extent a number, a name, or nothing. Names may be expressions (`past+seq`). Every symbol of the
shapes made here stands somewhere alone, so that its value is the extent of some input's axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from stitch import dims
from stitch.dims import Dim
from stitch.errors import InputError, InvalidModel, UnknownInput
from stitch.graph import Guard

Shape: TypeAlias = Sequence[int | str | None]
Shapes: TypeAlias = Mapping[str, Shape]

_ANONYMOUS = frozenset({"", "?", "*", "None", "-1"})  # names that exporters give to any dim they do not know


def input_shapes(inputs: Mapping[str, Shape | None], given: Shapes) -> tuple[dict[str, tuple[Dim, ...]], list[Guard]]:
    """The shape of each input; `given` goes before what the model says, also for the symbols that it replaces."""
    for name in given:
        if name not in inputs:
            raise UnknownInput(name, inputs=inputs)
    found = _Shapes({name: [_dim(d) for d in shape or ()] for name, shape in inputs.items()})
    replaced: dict[str, Dim] = {}
    for name, shape in inputs.items():
        if name in given:
            new = [_dim(d) for d in _checked(name, given[name])]
            if shape is not None and len(new) != len(shape):
                raise InvalidModel(
                    f"input {name!r} has rank {len(shape)}, but the shape given for it has rank {len(new)}",
                    advice="give one extent, name or None for each axis",
                )
            for old, d in zip(found.shapes[name], new, strict=False):
                if old is not None and d is not None and (symbol := dims.lone(old)) is not None:
                    replaced[symbol] = d
            found.shapes[name] = new
        elif shape is None:
            raise InvalidModel(f"input {name!r} has no shape", advice=f"give one: shapes={{{name!r}: [...]}}")
    for name in found.shapes:
        if name not in given:
            found.shapes[name] = [d if d is None else dims.substitute(d, replaced) for d in found.shapes[name]]
    found.name_unknown()
    found.solve()
    found.forget_hidden()
    return {name: tuple(d for d in shape if d is not None) for name, shape in found.shapes.items()}, found.guards


def _checked(name: str, shape: Shape) -> Shape:
    """A shape that the user gives: unlike a model, it has no business with odd extents."""
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        advice = "give a list with one entry for each axis"
        raise InputError(name, f"the shape given for input {name!r} is {shape!r}", advice)
    for d in shape:
        whole = isinstance(d, int) and not isinstance(d, bool) and d >= 0
        if not (d is None or whole or (isinstance(d, str) and d.strip())):
            advice = "an extent is a number from 0 on, a name, or None"
            raise InputError(name, f"the shape given for input {name!r} has the extent {d!r}", advice)
    return shape


@dataclass
class _Shapes:
    """The inputs' shapes on their way to ones in which every symbol stands alone somewhere, as an array shows it."""

    shapes: dict[str, list[Dim | None]]
    guards: list[Guard] = field(default_factory=list)

    def fresh(self, name: str, axis: int) -> Dim:
        """A symbol that is not in use: `x_0` for axis 0 of input x."""
        taken = {s for shape in self.shapes.values() for d in shape if d is not None for s in dims.symbols(d)}
        name = f"{name}_{axis}"
        while name in taken:
            name += "_"
        return dims.symbol(name)

    def replace(self, symbol: str, by: Dim) -> None:
        for shape in self.shapes.values():
            shape[:] = [d if d is None else dims.substitute(d, {symbol: by}) for d in shape]

    def axes(self) -> Iterator[tuple[str, int, Dim | None]]:
        for name, shape in self.shapes.items():
            yield from ((name, axis, d) for axis, d in enumerate(shape))

    def known(self) -> set[str]:
        return {s for _, _, d in self.axes() if d is not None and (s := dims.lone(d)) is not None}

    def name_unknown(self) -> None:
        for name, axis, d in [*self.axes()]:
            if d is None:
                self.shapes[name][axis] = self.fresh(name, axis)

    def solve(self) -> None:
        """`2*n`, where n stands nowhere alone, becomes a new symbol m, and n becomes m // 2."""
        while True:
            known = self.known()
            for name, axis, d in self.axes():
                unknown = dims.symbols(d) - known if d is not None else frozenset()
                if d is not None and len(unknown) == 1 and self._solve(name, axis, d, *unknown):
                    break
            else:
                return

    def _solve(self, name: str, axis: int, d: Dim, unknown: str) -> bool:
        rest = dims.substitute(d, {unknown: 0})
        factor = dims.substitute(d, {unknown: 1}) - rest
        if not isinstance(factor, int) or factor <= 0 or factor * dims.symbol(unknown) + rest != d:
            return False
        m = self.fresh(name, axis)
        solution = (m - rest) // factor
        self.replace(unknown, solution)
        self.shapes[name][axis] = m
        if (again := factor * dims.dim_max(solution, 0) + rest) != m:
            self.guards.append(Guard(m, again, f"axis {axis} of input {name!r}, which is {d}"))
        return True

    def forget_hidden(self) -> None:
        """What cannot be solved, `a-b` say, is just a name to ONNX: equal ones are one new symbol."""
        known = self.known()
        for name, axis, d in [*self.axes()]:
            if d is not None and dims.symbols(d) - known:
                m = self.fresh(name, axis)
                for shape in self.shapes.values():
                    shape[:] = [m if other == d else other for other in shape]


def _dim(d: int | str | None) -> Dim | None:
    if isinstance(d, str):
        parsed = None if d.strip() in _ANONYMOUS else dims.parse(d)
        return None if isinstance(parsed, int) and parsed < 0 else parsed
    return None if d is None or d < 0 else int(d)
