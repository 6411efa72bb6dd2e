"""Rules that push transposes towards the outputs, through everything that does not care about the order of axes."""

from __future__ import annotations

from collections.abc import Sequence

from stitch.graph import Value
from stitch.ops.primitives import ELEMENTWISE, REDUCTIONS
from stitch.rewrite import Rewriter, Rules, Step, for_each, merged
from stitch.simplify.permutations import Perm, blocks_of, inverse, permuted, reordered, stays, weight


def _relaying(r: Rewriter, v: Value, perm: Perm) -> float:
    """The bytes that it takes to transpose `v`: none for constants, or if that is done already; little for what is
    broadcast. What is done already counts in one direction only, lest a node goes back and forth."""
    node = r.maker(v)
    if perm < inverse(perm) and r.seen("transpose", v, perm=perm):
        return 0.0
    if node is None or node.prim not in ("const", "iota", "broadcast"):
        return weight(v)
    if node.prim == "broadcast" and r.maker(node.inputs[0], "const") is None:
        return min(weight(node.inputs[0]), weight(v) / 2)
    return 0.0


def _undone(r: Rewriter, v: Value, perm: Perm) -> bool:
    """Whether `v` is a transpose that `perm` undoes, but for axes of extent 1."""
    node = r.maker(v, "transpose")
    return node is not None and stays([node.attrs["perm"][p] for p in perm], node.inputs[0].shape)


def _spared(r: Rewriter, v: Value) -> float:
    """The bytes that are not moved if a transpose is undone: none of a constant, which would be transposed now."""
    node = r.maker(v, "transpose")
    return 0.0 if node is not None and r.maker(node.inputs[0], "const") is not None else weight(v)


def _shared_perm(r: Rewriter, inputs: Sequence[Value]) -> Perm | None:
    """The permutation that operands are transposes by, if undoing it on all of them moves fewer bytes than it saves."""
    perms = {node.attrs["perm"]: None for v in inputs if (node := r.maker(v, "transpose")) is not None}
    best, most = None, 0.0
    for perm in perms:
        back = inverse(perm)
        saved = sum(_spared(r, v) if _undone(r, v, back) else -_relaying(r, v, back) for v in inputs)
        if saved > most:
            best, most = perm, saved
    return best


def _sunk_elementwise(r: Rewriter, s: Step) -> Value | None:
    """add(transpose(x), transpose(y)) -> transpose(add(x, y)); add(transpose(x), broadcast(b)) likewise.

    Operands that are not transposes get the inverse one, if that is less than what is saved.
    """
    perm = _shared_perm(r, s.inputs)
    if perm is None:
        return None
    back = inverse(perm)
    return r.transpose(r.emit(s.prim, *[r.transpose(v, back) for v in s.inputs], **s.attrs), perm)


def _sunk_concat(r: Rewriter, s: Step) -> Value | None:
    """concat(transpose(x), transpose(y), axis i) -> transpose(concat(x, y, axis perm[i]))."""
    perm = _shared_perm(r, s.inputs)
    if perm is None:
        return None
    back = inverse(perm)
    y = r.emit("concat", *[r.transpose(v, back) for v in s.inputs], axis=perm[s.attrs["axis"]])
    return r.transpose(y, perm)


def _sunk_per_axis(r: Rewriter, s: Step) -> Value | None:
    """pad(transpose(x)) -> transpose(pad(x)); slice."""
    node = r.maker(s.x, "transpose")
    if node is None:
        return None
    perm = node.attrs["perm"]
    return r.transpose(r.emit(s.prim, node.inputs[0], **permuted(s.attrs, inverse(perm))), perm)


def _sunk_reduction(r: Rewriter, s: Step) -> Value | None:
    """reduce(transpose(x), axis i) -> transpose(reduce(x, axis perm[i])), over the axes that are left."""
    node = r.maker(s.x, "transpose")
    if node is None:
        return None
    perm, axes = node.attrs["perm"], s.attrs["axes"]
    kept = [p for i, p in enumerate(perm) if i not in axes]
    y = r.emit(s.prim, node.inputs[0], axes=tuple(sorted(perm[a] for a in axes)))
    return r.transpose(y, [sorted(kept).index(p) for p in kept])


def _sunk_gather(r: Rewriter, s: Step) -> Value | None:
    """gather(transpose(x), i, axis k) -> transpose(gather(x, i, axis perm[k])), over the axes that are left."""
    node = r.maker(s.x, "transpose")
    if node is None:
        return None
    perm, axes, leading = node.attrs["perm"], s.attrs["axes"], s.inputs[1].rank
    kept = [p for i, p in enumerate(perm) if i not in axes]
    y = r.emit("gather", node.inputs[0], *s.inputs[1:], axes=tuple(perm[a] for a in axes))
    return r.transpose(y, [*range(leading), *(leading + sorted(kept).index(p) for p in kept)])


def _sunk_reshape(r: Rewriter, s: Step) -> Value | None:
    """reshape(transpose(x [n, h, w, c] to n c h w), [n, c, h*w]) -> transpose(reshape(x, [n, h*w, c])).

    If the axes that are merged or split lie together, in the same order, before the transpose.
    """
    node = r.maker(s.x, "transpose")
    if node is None:
        return None
    x, perm = node.inputs[0], node.attrs["perm"]
    blocks = blocks_of(s.x.shape, s.shape)
    if blocks is None:
        return None
    cut = reordered(blocks, perm, x.shape)
    if cut is None:
        return None
    order = [j for _, theirs in cut for j in theirs]
    return r.transpose(r.reshape(x, [s.shape[j] for j in order]), inverse(order))


SINKING: Rules = merged(
    for_each(ELEMENTWISE, _sunk_elementwise),
    for_each(REDUCTIONS, _sunk_reduction),
    for_each(("pad", "slice"), _sunk_per_axis),
    {"concat": [_sunk_concat], "gather": [_sunk_gather], "reshape": [_sunk_reshape]},
)
