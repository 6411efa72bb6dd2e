"""The micro-kernels that a contraction calls, shared by all programs of a module."""

from __future__ import annotations

from collections.abc import MutableMapping

import numpy as np

from stitch.codegen.contract import emit_micro_kernel, tile_shapes
from stitch.codegen.emit_values import LLVM
from stitch.target import Target

FEW = (4, 3, 2)
"""Heights that there are besides the halves of a tile's: each kernel reads the whole panel, so that three rows are
better done by one than by two, above all where there are no others."""

ARGUMENTS = "ptr %a, i64 %a_row, ptr %b, ptr %c, i64 %c_row, ptr %loops"


def tile_kernel(
    kernels: MutableMapping[str, str],
    target: Target,
    dtype: np.dtype,
    rows: int,
    vectors: int,
    unit_a: bool,
    clipped: bool,
    short: bool,
    ahead: bool = False,
) -> str:
    """The name of the function for a tile, which is added to `kernels`. If clipped it has one more argument, the
    number of rows that exist: narrower and narrower kernels do them, and no row beyond is read. `short`: for sums that
    are one block; `ahead`: the rows behind those of a whole tile come next."""
    kind = f"{'.unit' if unit_a else ''}{'.short' if short else ''}{'.ahead' if ahead else ''}"

    def single(height: int) -> str:
        name = f"contract.{dtype.name}.{height}x{vectors}{kind}"
        if name not in kernels:
            soon = ahead and height == rows
            kernels[name] = emit_micro_kernel(name, target, dtype, height, vectors, unit_a, "internal", short, soon)
        return name

    if not clipped:
        return single(rows)
    name = f"contract.{dtype.name}.{rows}x{vectors}{kind}.clipped"
    if name not in kernels:
        halves = {h for h, wide in tile_shapes(target, dtype, (rows, vectors)) if wide == vectors}
        heights = sorted(halves | {h for h in FEW if h < rows}, reverse=True)
        kernels[name] = _chain(name, LLVM[dtype], [(h, single(h)) for h in heights])
    return name


def _chain(name: str, element: str, parts: list[tuple[int, str]]) -> str:
    lines = [f"define internal void @{name}({ARGUMENTS}, i64 %rows) nounwind {{", "entry:", "  br label %test0"]
    for k, (height, callee) in enumerate(parts):
        before = "entry" if k == 0 else f"test{k - 1}"
        old = ("%a", "%c", "%rows") if k == 0 else (f"%a{k - 1}", f"%c{k - 1}", f"%left{k - 1}")
        given = f"ptr %a{k}, i64 %a_row, ptr %b, ptr %c{k}, i64 %c_row, ptr %loops"
        lines += [
            f"test{k}:",
            f"  %a{k} = phi ptr [ {old[0]}, %{before} ], [ %a{k}.next, %call{k} ]",
            f"  %c{k} = phi ptr [ {old[1]}, %{before} ], [ %c{k}.next, %call{k} ]",
            f"  %left{k} = phi i64 [ {old[2]}, %{before} ], [ %left{k}.next, %call{k} ]",
            f"  %go{k} = icmp sge i64 %left{k}, {height}",
            f"  br i1 %go{k}, label %call{k}, label %{f'test{k + 1}' if k + 1 < len(parts) else 'done'}",
            f"call{k}:",
            f"  call void @{callee}({given})",
            f"  %ar{k} = mul i64 %a_row, {height}",
            f"  %a{k}.next = getelementptr {element}, ptr %a{k}, i64 %ar{k}",
            f"  %cr{k} = mul i64 %c_row, {height}",
            f"  %c{k}.next = getelementptr {element}, ptr %c{k}, i64 %cr{k}",
            f"  %left{k}.next = sub i64 %left{k}, {height}",
            f"  br label %test{k}",
        ]
    return "\n".join([*lines, "done:", "  ret void", "}", ""])
