"""A contraction's kernel: its axes by role, its operands as affine views of memory, and its epilogue as a group.

A label of the Einstein summation is a batch axis (in both operands and the result), a row axis (only the first
operand and the result), a column axis (only the second and the result), or is summed. The operands are exchanged
where needed so that the last axis of the result, along which it is contiguous, is a column.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from stitch import access
from stitch.access import Axis, Index
from stitch.dims import Dim
from stitch.graph import Node, Value
from stitch.stitching.dominants import split
from stitch.stitching.legalise import LOOPS
from stitch.stitching.schedule import Contraction, Group, Kernel, Phase, Placement, Root
from stitch.stitching.trace import Access, Blocked, Flow, trace


@dataclass
class _Domain:
    """Axes by label while they are being split; `at[label]` is the index of that label's dim."""

    axes: dict[int, tuple[Axis, ...]]
    at: dict[int, Index]

    def split(self, axis: Axis, inner: Dim) -> None:
        mapping, fresh = split(axis, inner)
        for label, axes in self.axes.items():
            self.axes[label] = tuple(b for a in axes for b in (fresh if a is axis else (a,)))
            self.at[label] = self.at[label].substitute(mapping)


def kernel(
    flow: Flow,
    name: str,
    members: Sequence[Node],
    leaving: Collection[Value],
    outside: Callable[[Value], bool],
    whole: Callable[[Value], bool] | None = None,
) -> Kernel:
    """The kernel of a contraction and the elementwise nodes behind it. `outside`: in memory before it runs; `whole`: as
    complete buffers, which any reshape may view linearly (all of them, if not given). Raises Blocked."""
    whole = outside if whole is None else whole
    node = next(n for n in members if n.prim == "contract")
    (left, right), (a_labels, b_labels) = node.inputs, (node.attrs["a"], node.attrs["b"])
    out = node.attrs["out"]
    if not set(b_labels) - set(a_labels) or (out and out[-1] not in b_labels):
        left, right, a_labels, b_labels = right, left, b_labels, a_labels
    extent = dict(zip(b_labels, right.shape, strict=True)) | dict(zip(a_labels, left.shape, strict=True))
    letters = {label: Axis(_role(label, a_labels, b_labels, out) + str(label), d) for label, d in extent.items()}
    here = _Domain({k: (v,) for k, v in letters.items()}, {k: access.of(v) for k, v in letters.items()})
    stored = [n.output for n in members if n.output in leaving]

    def placed(v: Value) -> bool:
        return v is node.output or outside(v)

    while True:
        at = tuple(here.at[label] for label in out)
        try:
            a = _view(flow, left, tuple(here.at[label] for label in a_labels), outside, whole)
            b = _view(flow, right, tuple(here.at[label] for label in b_labels), outside, whole)
            stores = {v: access.through_reshape(v.shape, node.output.shape, at) for v in stored}
            sources = [(v, i) for v, i in stores.items() if v is not node.output]
            seen = trace(flow, sources, placed, whole)
        except access.NeedsSplit as need:
            here.split(need.axis, need.inner)
        else:
            break

    def role(r: str) -> tuple[Axis, ...]:
        labels = [label for label in _ordered(out, a_labels) if _role(label, a_labels, b_labels, out) == r]
        return tuple(x for label in labels for x in here.axes[label] if x.extent != 1)

    if _loops(role("k"), (a.offset, b.offset)) > LOOPS:
        raise Blocked(next(v for v in (left, right) if flow.is_movement(v)))
    heavy = Contraction(node, role("b"), role("m"), role("n"), role("k"), a, b, at)
    reads = tuple(x for x in seen.accesses if x.value is not node.output)
    group = Group(
        (*heavy.batch, *heavy.rows, *heavy.columns),
        tuple(Root(v, v, i, i) for v, i in stores.items()),
        reads,
        seen.nodes,
    )
    placements: dict[Value, Placement] = dict.fromkeys(stored, "buffer")
    placements.setdefault(node.output, "tile")
    return Kernel(name, (Phase(heavy.batch, (group,), heavy),), placements, tuple(members))


def _loops(axes: Sequence[Axis], found: Sequence[Index]) -> int:
    """How many loops these axes are: an axis that steps by the whole of another, in every index, goes on with it."""
    whole = {tuple(i.coefficient(x) * x.extent for i in found) for x in axes}
    return sum(tuple(i.coefficient(x) for i in found) not in whole for x in axes)


def _role(label: int, a: Sequence[int], b: Sequence[int], out: Sequence[int]) -> str:
    if label not in out:
        return "k"
    return "b" if label in a and label in b else "m" if label in a else "n"


def _ordered(out: Sequence[int], a: Sequence[int]) -> list[int]:
    """Labels of the result in its order, then summed labels in the order of the first operand."""
    return [*out, *(label for label in a if label not in out)]


def _view(
    flow: Flow,
    operand: Value,
    at: tuple[Index, ...],
    outside: Callable[[Value], bool],
    whole: Callable[[Value], bool],
) -> Access:
    """The operand as one affine view of a value in memory; what is not has to be put there: Blocked.

    It is the innermost such value that is put there: a window over padding needs the padding, not every window."""
    value = operand
    while value in flow.scalars or not outside(value):
        if not flow.is_movement(value) or flow.producer[value].prim in ("pad", "gather"):
            raise Blocked(value)
        node = flow.producer[value]
        x = node.inputs[0]
        if node.prim == "reshape" and whole(x) and x not in flow.scalars and not access.is_squeeze(node):
            return Access(x, (access.linear(value.shape, at),), linear=True)
        try:
            at = access.operand_index(node, at)
        except access.NotAffine:
            raise Blocked(x if flow.is_movement(x) else value) from None
        value = x
    return Access(value, at)
