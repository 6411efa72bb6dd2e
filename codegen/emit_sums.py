"""Loops that fold, as LLVM's textual IR: sums of floats in the blocks that `stitch.codegen.sums` states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from stitch.codegen.emit_code import Writer
from stitch.codegen.emit_dims import Dims
from stitch.codegen.loops import Buffer, Fold
from stitch.codegen.sums import BLOCK_BITS, block_of, is_blocked


def in_blocks(
    w: Writer,
    d: Dims,
    folds: Sequence[Fold],
    stop: str | int,
    step: int,
    carried: Sequence[tuple[str, str]],
    body: Callable[[str | int, list[str]], Sequence[str]],
    stored: Iterable[Buffer],
    opaque: bool = False,
) -> list[str]:
    """`Writer.repeat` from 0 on, with sums in blocks (see `block_of`), around which there is another loop. `folds`:
    that of each value which is carried. The sum of the blocks before is in memory: one block, which is what a sum
    over an open dim nearly always has, costs two tests and no register."""
    count = stop // step if isinstance(stop, int) else None
    if not any(map(is_blocked, folds)) or (count is not None and count <= block_of(count)):
        return w.repeat(0, stop, step, carried, body, stored, opaque=opaque)
    size = str(block_of(count) * step) if count is not None else _block_size(w, str(stop), step)
    first = [name for _, name in carried]
    sums = [k for k, f in enumerate(folds) if is_blocked(f)]
    kinds = [carried[k][0] for k in sums]
    slots = [w.slot(kind) for kind in kinds]

    def block(at: str | int, now: list[str]) -> list[str]:
        after = d.add(str(at), size)
        end = w.pure(f"call i64 @llvm.smin.i64(i64 {after}, i64 {stop})", after, str(stop))
        begin = [(kind, first[k] if k in sums else now[k]) for k, (kind, _) in enumerate(carried)]
        found = w.repeat(at, end, step, begin, body, stored, opaque=opaque, some=True)

        def added(_: str | int, names: list[str]) -> list[str]:
            before = [w.here(f"load {kind}, ptr {slot}") for kind, slot in zip(kinds, slots, strict=True)]
            return [
                w.pure(f"fadd {kind} {total}, {name}", total, name)
                for kind, total, name in zip(kinds, before, names, strict=True)
            ]

        def kept(_: str | int, names: list[str]) -> list[str]:
            for kind, slot, k in zip(kinds, slots, sums, strict=True):
                w.effect(f"store {kind} {found[k]}, ptr {slot}")
            return []

        totals = w.repeat(0, str(at), 1, [(carried[k][0], found[k]) for k in sums], added, once=True)
        for k, total in zip(sums, totals, strict=True):
            found[k] = total
        w.repeat(end, str(stop), 1, [], kept, once=True)
        return found

    return w.repeat(0, stop, size, carried, block, stored)


def _block_size(w: Writer, stop: str, step: int) -> str:
    """`block_of` as many steps as there are up to `stop`, times the step."""
    count = w.pure(f"udiv i64 {stop}, {step}", stop) if step > 1 else stop
    zeros = w.pure(f"call i64 @llvm.ctlz.i64(i64 {count}, i1 false)", count)
    odd = w.pure(f"sub i64 65, {zeros}", zeros)
    half = w.pure(f"lshr i64 {odd}, 1", odd)
    bits = w.pure(f"call i64 @llvm.umax.i64(i64 {half}, i64 {BLOCK_BITS})", half)
    return w.pure(f"shl i64 {step}, {bits}", bits)
