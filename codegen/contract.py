"""The register-tiled micro-kernel of every contraction: matmul and convolution differ only in their strides.

    C[rows, NR] (+)= sum over k of A[row, k] * B[k, NR]        NR = vectors * lanes

k runs over up to three nested axes: one for a matmul, (kernel row, kernel column, channel) for a convolution whose
rows are neighbouring pixels. One function is emitted for each tile:

    void name(ptr a, i64 a_row, ptr b, ptr c, i64 c_row, ptr loops, i64 accumulate)

* `a` is the element at row 0 and k = 0; rows stand `a_row` elements apart. They may overlap, or coincide.
* `b` has, for each k, NR contiguous elements: a packed panel (padded to NR), or a matrix as it stands.
* `c` is a tile of rows `c_row` elements apart. All of it is written, so an edge gets a tile of scratch. It must not
  overlap the other two.
* `loops` points to nine i64: three extents, three strides of `a`, three of `b`, outermost first, strides in elements.
  Where an extent is 0 the sum is empty.
* `accumulate` other than 0 starts from what `c` holds, 0 starts from zero.

No alignment beyond the element's is assumed. `unit_a` promises that the innermost stride of `a` is 1.

*One order.* Every element of C is one chain of multiply-adds in the order of k, whatever the tile, and a chain that
was interrupted resumes from memory with `accumulate`. So neither the row count of a tile, nor the blocking of k, nor
the number of threads changes a bit of the result. Splitting a chain over several accumulators would.

*Straight SSA.* The text holds what the machine should do, and no pass is needed to make it good: accumulators are
phis, the two outer axes are one loop, and rows are reached from one pointer in five through x86's addressing modes
(p, p + s, p + 2s, p + 4s, and 3s in a register), so that all of a tile's addresses fit the integer registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stitch import dtypes
from stitch.target import Target

TYPES = {dtypes.FLOAT32: "float", dtypes.FLOAT64: "double", dtypes.INT32: "i32", dtypes.INT64: "i64"}


@dataclass(frozen=True)
class _Kernel:
    """What all parts of one kernel's text need to know."""

    target: Target
    dtype: np.dtype
    rows: int
    vectors: int
    unit_a: bool
    unroll: int

    @property
    def lanes(self) -> int:
        return self.target.lanes(self.dtype)

    @property
    def element(self) -> str:
        return TYPES[self.dtype]

    @property
    def vector(self) -> str:
        return f"<{self.lanes} x {self.element}>"

    @property
    def cells(self) -> list[str]:
        return [f"{i}.{j}" for i in range(self.rows) for j in range(self.vectors)]

    @property
    def reach(self) -> int:
        """Rows served by one pointer: x86 adds a register times 1, 2, 4 or 8 to it, others have registers to spare."""
        return 5 if self.target.is_x86 else 1

    @property
    def pointers(self) -> range:
        return range(0, self.rows, self.reach)


def emit_micro_kernel(
    name: str,
    target: Target,
    dtype: np.dtype,
    rows: int,
    vectors: int,
    unit_a: bool,
    *,
    linkage: str = "",
    unroll: int = 1,
) -> str:
    """The text of the function `name`. `unroll` steps of the innermost axis make one turn of its loop."""
    if dtype not in TYPES:
        raise ValueError(f"no micro-kernel for {dtype}; there is one for {', '.join(d.name for d in TYPES)}")
    if min(rows, vectors, unroll) < 1:
        raise ValueError(f"a tile of {rows}x{vectors} vectors, {unroll} steps at a time, is empty")
    kernel = _Kernel(target, dtype, rows, vectors, unit_a, unroll)
    head = f"define {linkage + ' ' if linkage else ''}void @{name}"
    arguments = "ptr %a, i64 %a_row, ptr %b, ptr %c, i64 %c_row, ptr %loops, i64 %accumulate"
    body = [*_entry(kernel), *_outer(kernel), *_inner(kernel), *_next(kernel), *_finish(kernel)]
    return "\n".join([f"{head}({arguments}) nounwind {{", *body, "}", ""])


def _phis(k: _Kernel, name: str, *incoming: tuple[str, str]) -> Iterator[str]:
    """An accumulator per cell: `name` is what (value, block) brings, a value without a % being a constant."""
    for cell in k.cells:
        sources = (f"[ {value + cell if value[0] == '%' else value}, %{block} ]" for value, block in incoming)
        yield f"  %{name}{cell} = phi {k.vector} {', '.join(sources)}"


def _entry(k: _Kernel) -> Iterator[str]:
    """Read the arguments, and start the accumulators from zero or from C."""
    size = k.dtype.itemsize
    yield "entry:"
    for index, name in enumerate(("n0", "n1", "n2", "ea0", "ea1", "ea2", "eb0", "eb1", "eb2")):
        yield f"  %{name}.at = getelementptr i64, ptr %loops, i64 {index}"
        yield f"  %{name} = load i64, ptr %{name}.at"
    for axis in range(3):
        yield f"  %a{axis} = mul i64 %ea{axis}, {size}"
        yield f"  %b{axis} = mul i64 %eb{axis}, {size}"
    yield f"  %s1 = mul i64 %a_row, {size}"
    yield "  %s3 = mul i64 %s1, 3"
    yield f"  %s{k.reach}x = mul i64 %s1, {k.reach}"
    yield f"  %cs = mul i64 %c_row, {size}"
    for i in range(1, k.rows):
        yield f"  %c{i} = getelementptr i8, ptr %c{i - 1 or ''}, i64 %cs"
    yield "  %n01 = mul i64 %n0, %n1"
    yield "  %n = mul i64 %n01, %n2"
    yield "  %empty = icmp eq i64 %n, 0"
    for axis in "ab":  # from the end of axis 1 to the start of the next step of axis 0
        yield f"  %{axis}.run = mul i64 %{axis}1, %n1"
        yield f"  %{axis}.turn = sub i64 %{axis}0, %{axis}.run"
    yield "  %fresh = icmp eq i64 %accumulate, 0"
    yield "  br i1 %fresh, label %begin, label %resume"
    yield "resume:"
    yield from _tile(k, lambda cell, at: f"  %r{cell} = load {k.vector}, ptr {at}, align {size}")
    yield "  br label %begin"
    yield "begin:"
    yield from _phis(k, "z", ("zeroinitializer", "entry"), ("%r", "resume"))
    yield "  br i1 %empty, label %finish, label %outer"


def _tile(k: _Kernel, access: Callable[[str, str], str]) -> Iterator[str]:
    """`access(cell, address)` for each vector of the tile of C."""
    for i in range(k.rows):
        for j in range(k.vectors):
            at = f"%c{i or ''}"
            if j:
                # Each block needs names of its own; `access` is one of a load and a store.
                name = access("", "").split()[0].strip("%") + f".{i}.{j}.at"
                yield f"  %{name} = getelementptr {k.vector}, ptr {at}, i64 {j}"
                at = f"%{name}"
            yield access(f"{i}.{j}", at)


def _outer(k: _Kernel) -> Iterator[str]:
    """Axes 0 and 1 are one loop of n0 * n1 turns; %i1 says where axis 1 wraps."""
    yield "outer:"
    yield from _phis(k, "o", ("%z", "begin"), ("%x", "next"))
    yield "  %oa = phi ptr [ %a, %begin ], [ %oa.next, %next ]"
    yield "  %ob = phi ptr [ %b, %begin ], [ %ob.next, %next ]"
    yield "  %left = phi i64 [ %n01, %begin ], [ %left.next, %next ]"
    yield "  %i1 = phi i64 [ %n1, %begin ], [ %i1.next, %next ]"
    for i in k.pointers:
        if i:
            yield f"  %op{i} = getelementptr i8, ptr %op{i - k.reach}, i64 %s{k.reach}x"
        else:
            yield "  %op0 = getelementptr i8, ptr %oa, i64 0"
    if k.unroll == 1:
        yield "  br label %tail"
    else:
        yield f"  %turns = udiv i64 %n2, {k.unroll}"
        yield f"  %rest = urem i64 %n2, {k.unroll}"
        yield "  %short = icmp eq i64 %turns, 0"
        yield "  br i1 %short, label %tail, label %inner"


def _inner(k: _Kernel) -> Iterator[str]:
    """The innermost axis: `unroll` steps at a time, then one at a time."""
    if k.unroll > 1:
        yield from _loop(k, "inner", k.unroll, "%turns", ("o", "op", "%ob", "outer"))
        yield "between:"
        yield "  %done = icmp eq i64 %rest, 0"
        yield "  br i1 %done, label %next, label %tail"
    yield from _loop(k, "tail", 1, "", ("o", "op", "%ob", "outer"))


def _loop(k: _Kernel, block: str, steps: int, turns: str, start: tuple[str, str, str, str]) -> Iterator[str]:
    """One loop over k; its accumulators are %<letter><cell>."""
    acc = block[0]
    last = f"{acc}{steps}."
    from_inner = block == "tail" and k.unroll > 1
    sources = [(f"%{start[0]}", start[3])]
    if from_inner:
        sources.append((f"%i{k.unroll}.", "between"))
    yield f"{block}:"
    yield from _phis(k, f"{acc}0.", *sources, (f"%{last}", block))

    def phi(name: str, kind: str, first: str, middle: str) -> str:
        also = f"[ {middle}, %between ], " if from_inner else ""
        return f"  %{name} = phi {kind} [ {first}, %outer ], {also}[ %{name}.next, %{block} ]"

    for i in k.pointers:
        yield phi(f"{acc}p{i}.0", "ptr", f"%op{i}", f"%ip{i}.0.next")
    yield phi(f"{acc}b.0", "ptr", "%ob", "%ib.0.next")
    count = turns or ("%rest" if from_inner else "%n2")
    yield phi(f"{acc}k", "i64", "%n2" if from_inner else count, "%rest")
    for u in range(steps):
        yield from _step(k, acc, u)
    for i in k.pointers:
        yield _advance(k, f"{acc}p{i}", steps, "%a2", k.unit_a, "next")
    yield f"  %{acc}b.0.next = getelementptr i8, ptr %{acc}b.{steps - 1}, i64 %b2"
    yield f"  %{acc}k.next = add i64 %{acc}k, -1"
    yield f"  %{acc}k.end = icmp eq i64 %{acc}k.next, 0"
    yield f"  br i1 %{acc}k.end, label %{'next' if block == 'tail' else 'between'}, label %{block}"


def _advance(k: _Kernel, pointer: str, steps: int, stride: str, unit: bool, name: str) -> str:
    """%pointer.0 moved by `steps` steps."""
    if unit:
        return f"  %{pointer}.0.{name} = getelementptr i8, ptr %{pointer}.0, i64 {steps * k.dtype.itemsize}"
    return f"  %{pointer}.0.{name} = getelementptr i8, ptr %{pointer}.{steps - 1}, i64 {stride}"


def _step(k: _Kernel, acc: str, u: int) -> Iterator[str]:
    """One k: load a row of B, and for each row of the tile one element of A."""
    size, tag = k.dtype.itemsize, f"{acc}{u}"
    if u:
        yield f"  %{acc}b.{u} = getelementptr i8, ptr %{acc}b.{u - 1}, i64 %b2"
        for i in k.pointers:
            if k.unit_a:
                yield f"  %{acc}p{i}.{u} = getelementptr i8, ptr %{acc}p{i}.0, i64 {u * size}"
            else:
                yield f"  %{acc}p{i}.{u} = getelementptr i8, ptr %{acc}p{i}.{u - 1}, i64 %a2"
    for j in range(k.vectors):
        yield f"  %{tag}.w{j}.at = getelementptr {k.vector}, ptr %{acc}b.{u}, i64 {j}"
        yield f"  %{tag}.w{j} = load {k.vector}, ptr %{tag}.w{j}.at, align {size}"
    for i in range(k.rows):
        yield from _broadcast(k, f"{tag}.v{i}", f"%{acc}p{i - i % k.reach}.{u}", i % k.reach)
        for j in range(k.vectors):
            old, new = f"%{acc}{u}.{i}.{j}", f"%{acc}{u + 1}.{i}.{j}"
            yield from _multiply_add(k, new, f"%{tag}.v{i}", f"%{tag}.w{j}", old)


def _broadcast(k: _Kernel, name: str, pointer: str, offset: int) -> Iterator[str]:
    at = pointer
    if offset:
        kind, scale = ("i8", "%s3") if offset == 3 else (f"[{offset} x i8]", "%s1")
        yield f"  %{name}.at = getelementptr {kind}, ptr {pointer}, i64 {scale}"
        at = f"%{name}.at"
    yield f"  %{name}.x = load {k.element}, ptr {at}, align {k.dtype.itemsize}"
    yield f"  %{name}.y = insertelement {k.vector} poison, {k.element} %{name}.x, i64 0"
    yield f"  %{name} = shufflevector {k.vector} %{name}.y, {k.vector} poison, <{k.lanes} x i32> zeroinitializer"


def _multiply_add(k: _Kernel, new: str, x: str, y: str, old: str) -> Iterator[str]:
    v = k.vector
    if dtypes.is_float(k.dtype) and k.target.fma:
        suffix = f"v{k.lanes}f{k.dtype.itemsize * 8}"
        yield f"  {new} = call {v} @llvm.fma.{suffix}({v} {x}, {v} {y}, {v} {old})"
        return
    multiply, add = ("fmul", "fadd") if dtypes.is_float(k.dtype) else ("mul", "add")
    yield f"  {new}.m = {multiply} {v} {x}, {y}"
    yield f"  {new} = {add} {v} {old}, {new}.m"


def _next(k: _Kernel) -> Iterator[str]:
    """The end of the innermost axis: move on along axis 1, and along axis 0 where axis 1 wraps."""
    yield "next:"
    if k.unroll > 1:
        yield from _phis(k, "x", ("%t1.", "tail"), (f"%i{k.unroll}.", "between"))
    else:
        yield from _phis(k, "x", ("%t1.", "tail"))
    yield "  %i1.less = add i64 %i1, -1"
    yield "  %wrap = icmp eq i64 %i1.less, 0"
    yield "  %i1.next = select i1 %wrap, i64 %n1, i64 %i1.less"
    for axis in "ab":
        yield f"  %o{axis}.step = getelementptr i8, ptr %o{axis}, i64 %{axis}1"
        yield f"  %{axis}.jump = select i1 %wrap, i64 %{axis}.turn, i64 0"
        yield f"  %o{axis}.next = getelementptr i8, ptr %o{axis}.step, i64 %{axis}.jump"
    yield "  %left.next = add i64 %left, -1"
    yield "  %last = icmp eq i64 %left.next, 0"
    yield "  br i1 %last, label %finish, label %outer"


def _finish(k: _Kernel) -> Iterator[str]:
    yield "finish:"
    yield from _phis(k, "f", ("%z", "begin"), ("%x", "next"))
    yield from _tile(k, lambda cell, at: f"  store {k.vector} %f{cell}, ptr {at}, align {k.dtype.itemsize}")
    yield "  ret void"


def reference(
    a: npt.NDArray[np.generic], a_row: int, b: npt.NDArray[np.generic], rows: int, columns: int, loops: tuple[int, ...]
) -> npt.NDArray[np.generic]:
    """What the kernel adds up, for flat arrays `a` and `b` that begin where its pointers do."""
    extents, a_strides, b_strides = loops[:3], loops[3:6], loops[6:]
    k = np.indices(extents).reshape(3, -1)
    a_at = np.arange(rows)[:, None] * a_row + np.asarray(a_strides) @ k
    b_at = (np.asarray(b_strides) @ k)[:, None] + np.arange(columns)
    result: npt.NDArray[np.generic] = a[a_at] @ b[b_at]
    return result

def main_tiles(target, dtype): return ((14,2),(8,3),(6,4))
def efficiency(t,d,r,v): return 1.0
