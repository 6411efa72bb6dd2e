"""Index relations: which element of its operand a movement primitive reads, as affine functions of named axes.

A value inside a group of fused nodes is an expression of the group's axes; movement only rewrites the index.
`operand_indices` does one step of that, from the index of a node's output to the indices of its operands: transpose
permutes, broadcast drops, slice and window are affine, pad is affine under bounds, gather has loaded terms, and
reshape splits and merges. Where a reshape divides an axis (a merged extent read as two), the axis itself has to be
split: `NeedsSplit` says which and by what, and the caller starts again with finer axes. So neither division nor
remainder ever appears in an index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stitch import dims
from stitch.dims import Dim
from stitch.graph import Node, Value


@dataclass(frozen=True, eq=False)
class Variable:
    """Something that an index may depend on. Names are for people; identity is by object."""

    name: str


@dataclass(frozen=True, eq=False)
class Axis(Variable):
    """An iteration variable: 0 <= axis < extent, which may be symbolic."""

    extent: Dim


@dataclass(frozen=True, eq=False)
class Loaded(Variable):
    """An index read from memory: `value` at `at`, clamped to [0, limit). `key` makes equal loads one variable."""

    value: Value
    at: tuple[Index, ...]
    limit: Dim


@dataclass(frozen=True)
class Index:
    """offset + Σ coefficient · variable. Canonical: no zero coefficients, each variable once."""

    offset: Dim = 0
    terms: tuple[tuple[Variable, Dim], ...] = ()

    def coefficient(self, variable: Variable) -> Dim:
        return next((c for v, c in self.terms if v is variable), 0)

    def plus(self, offset: Dim) -> Index:
        return Index(self.offset + offset, self.terms)

    def times(self, factor: Dim) -> Index:
        return index(self.offset * factor, *((v, c * factor) for v, c in self.terms))

    def axis(self) -> Axis | None:
        """The axis that this index is, if it is one and nothing else."""
        if self.offset == 0 and len(self.terms) == 1 and self.terms[0][1] == 1 and isinstance(self.terms[0][0], Axis):
            return self.terms[0][0]
        return None

    @property
    def parts(self) -> tuple[Axis, ...]:
        """The axes among its terms, those with large steps first, as far as steps are numbers."""
        found = [(v, c) for v, c in self.terms if isinstance(v, Axis)]
        return tuple(v for v, _ in sorted(found, key=lambda t: -t[1] if isinstance(t[1], int) else 0))

    def axes(self) -> frozenset[Axis]:
        """Every axis it depends on, through loaded indices too."""
        found: set[Axis] = set()
        for v, _ in self.terms:
            if isinstance(v, Axis):
                found.add(v)
            elif isinstance(v, Loaded):
                found.update(*(i.axes() for i in v.at))
        return frozenset(found)

    def substitute(self, mapping: Mapping[Axis, Index]) -> Index:
        total = Index(self.offset)
        for v, c in self.terms:
            if isinstance(v, Axis) and v in mapping:
                total = add(total, mapping[v].times(c))
            elif isinstance(v, Loaded):
                at = tuple(i.substitute(mapping) for i in v.at)
                total = add(total, Index(0, ((v if at == v.at else Loaded(v.name, v.value, at, v.limit), c),)))
            else:
                total = add(total, Index(0, ((v, c),)))
        return total


ZERO = Index()


def index(offset: Dim, *terms: tuple[Variable, Dim]) -> Index:
    """A canonical index: terms of one variable are added up, zeros dropped; order of first occurrence."""
    total: dict[Variable, Dim] = {}
    for variable, coefficient in terms:
        total[variable] = total.get(variable, 0) + coefficient
    return Index(offset, tuple((v, c) for v, c in total.items() if c != 0))


def add(*indices: Index) -> Index:
    offset: Dim = 0
    for i in indices:
        offset = offset + i.offset
    return index(offset, *(t for i in indices for t in i.terms))


def of(axis: Axis) -> Index:
    """The index that is this axis; an axis of extent 1 is always 0."""
    return ZERO if axis.extent == 1 else Index(0, ((axis, 1),))


@dataclass(frozen=True)
class Bound:
    """0 <= index < limit."""

    index: Index
    limit: Dim


class NeedsSplit(Exception):
    """`axis` must be iterated as outer · inner + the rest, with this inner extent."""

    def __init__(self, axis: Axis, inner: Dim) -> None:
        super().__init__(f"axis {axis.name} < {axis.extent} by {inner}")
        self.axis = axis
        self.inner = inner


class NotAffine(Exception):
    """The operand of this node must be in memory: its index is not an affine function of any axes."""


def linear(shape: Sequence[Dim], at: Sequence[Index]) -> Index:
    """Offset in elements of an element of a contiguous row-major array."""
    total = ZERO
    stride: Dim = 1
    for d, i in zip(reversed(shape), reversed(at), strict=True):
        total = add(i.times(stride), total)
        stride = stride * d
    return total


def strides(shape: Sequence[Dim]) -> tuple[Dim, ...]:
    """Row-major strides in elements."""
    out: list[Dim] = []
    stride: Dim = 1
    for d in reversed(shape):
        out.append(stride)
        stride = stride * d
    return tuple(reversed(out))


def through_reshape(inner: Sequence[Dim], outer: Sequence[Dim], at: Sequence[Index]) -> tuple[Index, ...]:
    """Index into `inner`, the operand's shape, of the element at `at` of the result of shape `outer`.

    Raises NeedsSplit or NotAffine."""
    segments = dims.factor_segments(inner, outer)
    if segments is None:
        raise NotAffine
    out: list[Index] = [ZERO] * len(inner)
    for mine, theirs in segments:
        if not mine:
            continue
        here = linear([outer[j] for j in theirs], [at[j] for j in theirs])
        for k in reversed(mine[1:]):
            here, out[k] = _divide(here, inner[k])
        out[mine[0]] = here
    return tuple(out)


def _divide(i: Index, d: Dim) -> tuple[Index, Index]:
    """Quotient and remainder by d of an index whose value is not negative."""
    high: list[tuple[Variable, Dim]] = []
    low: list[tuple[Variable, Dim]] = []
    for v, c in i.terms:
        q = dims.quotient(c, d)
        if q is not None:
            high.append((v, q))
        else:
            low.append((v, c))
    q_offset, r_offset = _divide_offset(i.offset, d)
    largest = r_offset
    for v, c in low:
        if not isinstance(v, Axis):
            raise NotAffine
        largest = largest + c * (v.extent - 1)
    if all(dims.prove_le(0, c) for c in (r_offset, *(c for _, c in low))):  # padding by whole rows puts less there
        if not low and (r_offset == 0 or dims.prove_le(r_offset + 1, d)):
            return index(q_offset, *high), Index(r_offset)
        if dims.prove_le(largest + 1, d):
            return index(q_offset, *high), index(r_offset, *low)
    # An axis that runs across multiples of d: iterate it as two.
    for v, c in low:
        inner = dims.quotient(d, c)
        if isinstance(v, Axis) and inner is not None and inner != 1 and r_offset == 0:
            outer = dims.quotient(v.extent, inner)
            if outer is not None and inner != v.extent:
                raise NeedsSplit(v, inner)
    raise NotAffine


def _divide_offset(offset: Dim, d: Dim) -> tuple[Dim, Dim]:
    if offset == 0:
        return 0, 0
    if isinstance(offset, int) and isinstance(d, int):
        return offset // d, offset % d
    q = dims.quotient(offset, d)
    return (q, 0) if q is not None else (0, offset)


def operand_index(node: Node, at: Sequence[Index]) -> tuple[Index, ...]:
    """Index of the element of the first operand that a movement node (not concat, not gather) yields at `at`.

    For `pad` it is valid only where `bounds(node, at)` hold. Raises NeedsSplit or NotAffine."""
    attrs, x = node.attrs, node.inputs[0]
    match node.prim:
        case "transpose":
            out = [ZERO] * x.rank
            for i, p in enumerate(attrs["perm"]):
                out[p] = at[i]
            return tuple(out)
        case "broadcast":
            last = at[len(at) - x.rank :]
            target = node.output.shape[node.output.rank - x.rank :]
            return tuple(ZERO if d == 1 and t != 1 else i for d, t, i in zip(x.shape, target, last, strict=True))
        case "slice":
            return tuple(i.times(t).plus(s) for i, s, t in zip(at, attrs["starts"], attrs["steps"], strict=True))
        case "pad":
            return tuple(i.plus(-lo) for i, lo in zip(at, attrs["lo"], strict=True))
        case "window":
            out = list(at[: x.rank])
            rows = zip(attrs["axes"], attrs["strides"], attrs["dilations"], at[x.rank :], strict=True)
            for axis, stride, dilation, k in rows:
                out[axis] = add(at[axis].times(stride), k.times(dilation))
            return tuple(out)
        case "reshape":
            return through_reshape(x.shape, node.output.shape, at)
    raise AssertionError(node.prim)


def is_squeeze(node: Node) -> bool:
    """Whether a reshape only adds or drops dims of one element."""
    before, after = ([d for d in v.shape if d != 1] for v in (node.inputs[0], node.output))
    return node.prim == "reshape" and before == after


def bounds(node: Node, at: Sequence[Index]) -> tuple[Bound, ...]:
    """Where a `pad` shows its operand: one bound per axis that is padded."""
    x = node.inputs[0]
    rows = zip(at, x.shape, node.attrs["lo"], node.attrs["hi"], strict=True)
    return tuple(Bound(i.plus(-lo), d) for i, d, lo, hi in rows if lo != 0 or hi != 0)


def gather_index(node: Node, at: Sequence[Index], loaded: Sequence[Index]) -> tuple[Index, ...]:
    """Index into a gather's data: `loaded` on its axes, the trailing part of `at` on the rest."""
    data, axes = node.inputs[0], node.attrs["axes"]
    rest = iter(at[node.inputs[1].rank :])
    by_axis = dict(zip(axes, loaded, strict=True))
    return tuple(by_axis[i] if i in by_axis else next(rest) for i in range(data.rank))
