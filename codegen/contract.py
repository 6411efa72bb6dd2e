"""The register-tiled micro-kernel of every contraction: matmul and convolution differ only in their strides.

    C[rows, NR] = sum over k of A[row, k] * B[k, NR]        NR = vectors * lanes

k runs over up to three nested axes: one for a matmul, (kernel row, kernel column, channel) for a convolution whose
rows are neighbouring pixels. One function is emitted for each tile:

    void name(ptr a, i64 a_row, ptr b, ptr c, i64 c_row, ptr loops)
    void name(ptr a, i64 a_row, ptr b, ptr loops, …)            with an ending (`codegen/emit_endings.py`) instead of c

* `a` is the element at row 0 and k = 0; rows stand `a_row` elements apart. They may overlap, or coincide.
* `b` has, for each k, NR contiguous elements: a packed panel (padded to NR), or a matrix as it stands.
* `c` is a tile of rows `c_row` elements apart. All of it is written, so an edge gets a tile of scratch. It must not
  overlap the other two.
* `loops` points to nine i64: three extents, three strides of `a`, three of `b`, outermost first, strides in elements.
  Where an extent is 0 the sum is empty.

No alignment beyond the element's is assumed. `unit_a` promises that the innermost stride of `a` is 1.

*One order.* Every element of C is a sum of blocks, each of them one chain of multiply-adds in the order of k. Blocks
follow from the three extents alone (`codegen/sums.py`), so neither the row count of a tile nor the number of threads
changes a bit of the result. The sum of the blocks so far is in C, that of the present one in registers.

*Straight SSA.* The text holds what the machine should do, and no pass is needed to make it good: accumulators are
phis, the two outer axes and the blocks are one loop, and rows are reached from one pointer in five through x86's
addressing modes (p, p + s, p + 2s, p + 4s, and 3s in a register), so that all of a tile's addresses fit the integer
registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stitch import dtypes
from stitch.codegen.sums import BLOCK_BITS
from stitch.target import Target

TYPES = {dtypes.FLOAT32: "float", dtypes.FLOAT64: "double", dtypes.INT32: "i32", dtypes.INT64: "i64"}


# -- Tiles -----------------------------------------------------------------------------------------

WIDE = ((8, 3), (6, 4), (14, 2))  # with 32 vector registers
WHOLE = ((6, 4),)  # with 32, for integers, of which 8x3 reaches only 0.82 of the peak
NARROW = ((6, 2), (4, 3))  # with 16
SMALL = ((3, 3), (4, 2), (2, 1))  # where a product needs registers of its own

FMA_RATE, LOAD_RATE, LATENCY = 2.0, 2.0, 4.0  # vectors per cycle, and cycles until a sum can be added to again
LINE = 64  # bytes
ALIAS, WAYS = 4096, 8  # addresses this far apart share a set of an L1 cache with this many ways


def main_tiles(target: Target, dtype: np.dtype) -> tuple[tuple[int, int], ...]:
    """The tiles (rows, vectors) that run near the peak. The first is right for any K and any row stride."""
    wide = WIDE if dtypes.is_float(dtype) else WHOLE
    among = wide if target.vector_registers >= 32 else NARROW
    fitting = tuple(tile for tile in among if fits(target, dtype, *tile))
    return fitting or tuple(tile for tile in SMALL if fits(target, dtype, *tile))[:1]


def tile_shapes(target: Target, dtype: np.dtype, main: tuple[int, int] | None = None) -> tuple[tuple[int, int], ...]:
    """The main tile, then those for what remains at the edges: fewer rows by halves, and then fewer vectors."""
    rows, vectors = main or main_tiles(target, dtype)[0]
    heights = []
    while rows:
        heights.append(rows)
        rows //= 2
    return tuple((height, width) for width in range(vectors, 0, -1) for height in heights)


def fits(target: Target, dtype: np.dtype, rows: int, vectors: int) -> bool:
    """Whether accumulators, a row of B, an element of A and what a product needs are all in registers."""
    return rows * vectors + vectors + 1 + _temporaries(target, dtype) <= target.vector_registers


def _temporaries(target: Target, dtype: np.dtype) -> int:
    """Registers that one product takes besides, found by reading the assembly.

    None if it is fused, one for its value if it is not, more where it is put together of parts. Elsewhere than on
    x86, LLVM needs two for the order in which it likes to load.
    """
    if not target.is_x86:
        return 20 if dtype == dtypes.INT64 else 2  # NEON multiplies int64 in the scalar registers
    if dtypes.is_float(dtype):
        return 0 if target.fma else 1
    if dtype == dtypes.INT32:
        return 1 if target.has("sse4.1") else 4
    return 2 if target.has("avx512dq") else 4


def efficiency(target: Target, dtype: np.dtype, rows: int, vectors: int) -> float:
    """The share of the multiply-add peak that a long K can reach, on a core that does two of each in a cycle.

    One k takes the longest of  rows * vectors / FMA_RATE  multiply-adds,  (rows + vectors) / LOAD_RATE  loads, and
    LATENCY, since the next k adds to the same accumulators; the share is the first of these over the longest. A tile
    that does not fit the registers is taken to lose half.

    Not modelled: cores that split their widest vectors (Zen 4 at 512 bits) do better with thin tiles, SSE2's copies
    and shuffles cost a fifth, and one row reads the panel from L2 no faster than about half of the peak.
    """
    work = rows * vectors / FMA_RATE
    share = work / max(work, (rows + vectors) / LOAD_RATE, LATENCY)
    return share if fits(target, dtype, rows, vectors) else share / 2


# -- Text ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ending:
    """What is done with the results while they are in registers, instead of storing them to c: lines of text, in which
    %s<i>.<j> is vector j of row i, and the parameters that they use."""

    parameters: tuple[str, ...]
    lines: tuple[str, ...]


@dataclass(frozen=True)
class _Kernel:
    """What all parts of one kernel's text need to know."""

    target: Target
    dtype: np.dtype
    rows: int
    vectors: int
    unit_a: bool
    short: bool
    ahead: bool = False
    ending: Ending | None = None

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
    def blocked(self) -> bool:
        """Whether a sum may be of several blocks. One without needs fewer registers around the loop, and half the
        instructions to begin and to end."""
        return dtypes.is_float(self.dtype) and not self.short

    @property
    def reach(self) -> int:
        """Rows served by one pointer: x86 adds a register times 1, 2, 4 or 8 to it, others have registers to spare."""
        return 5 if self.target.is_x86 else 1


def emit_micro_kernel(
    name: str,
    target: Target,
    dtype: np.dtype,
    rows: int,
    vectors: int,
    unit_a: bool,
    linkage: str = "",
    short: bool = False,
    ahead: bool = False,
    ending: Ending | None = None,
) -> str:
    """The text of the function `name`. Intrinsics need no declaration. `short`: for sums that are one block; only they
    can have an `ending`, and of these only such as are not empty. `ahead`: the rows behind these come next, and lie so
    close that a line of memory for each k is what they take."""
    if dtype not in TYPES:
        raise ValueError(f"no micro-kernel for {dtype}; there is one for {', '.join(d.name for d in TYPES)}")
    if min(rows, vectors) < 1:
        raise ValueError(f"a tile of {rows}x{vectors} vectors is empty")
    if ending is not None and not short:
        raise ValueError("the sums of several blocks are in memory")
    k = _Kernel(target, dtype, rows, vectors, unit_a, short, ahead, ending)
    to = ("ptr %c", "i64 %c_row") if ending is None else ()
    given = ("ptr %a", "i64 %a_row", "ptr %b", *to, "ptr %loops", *(ending.parameters if ending is not None else ()))
    arguments = ", ".join(given)
    body = [*_entry(k), *_outer(k), *_inner(k), *_next(k), *_drain(k)]
    head = f"define {linkage} void" if linkage else "define void"
    return "\n".join([f"{head} @{name}({arguments}) nounwind {{", *body, "}", ""])


def _entry(k: _Kernel) -> Iterator[str]:
    """Read the arguments, and find how long blocks are; an empty sum ends here."""
    size = k.dtype.itemsize
    yield "entry:"
    for index, name in enumerate(("n0", "n1", "n2", "ea0", "ea1", "ea2", "eb0", "eb1", "eb2")):
        yield f"  %{name}.at = getelementptr i64, ptr %loops, i64 {index}"
        yield f"  %{name} = load i64, ptr %{name}.at"
    for axis in range(3):
        yield f"  %a{axis} = mul i64 %ea{axis}, {size}"
        yield f"  %b{axis} = mul i64 %eb{axis}, {size}"
    yield f"  %row = mul i64 %a_row, {size}"
    yield "  %row3 = mul i64 %row, 3"
    yield f"  %row.reach = mul i64 %row, {k.reach}"
    if k.ending is None:
        yield f"  %c.row = mul i64 %c_row, {size}"
        for i in range(1, k.rows):
            yield f"  %c{i} = getelementptr i8, ptr %c{i - 1 or ''}, i64 %c.row"
    yield "  %n01 = mul i64 %n0, %n1"
    yield "  %n = mul i64 %n01, %n2"
    if k.ending is None:
        yield "  %empty = icmp eq i64 %n, 0"
    for side in "ab":  # from the last step of side 1 to the next step of side 0
        yield f"  %{side}.run = mul i64 %{side}1, %n1"
        yield f"  %{side}.rise = add i64 %{side}0, %{side}1"
        yield f"  %{side}.turn = sub i64 %{side}.rise, %{side}.run"
    if k.blocked:  # block_of(n)
        yield "  %zeros = call i64 @llvm.ctlz.i64(i64 %n, i1 false)"
        yield "  %odd = sub i64 65, %zeros"
        yield "  %half = lshr i64 %odd, 1"
        yield f"  %bits = call i64 @llvm.umax.i64(i64 %half, i64 {BLOCK_BITS})"
        yield "  %block = shl i64 1, %bits"
        yield "  %most = call i64 @llvm.umin.i64(i64 %n2, i64 %block)"
    if k.ending is not None:
        yield "  br label %outer"
        return
    yield "  br i1 %empty, label %nothing, label %outer"
    yield "nothing:"
    for cell, i, j in _cells(k):
        yield from _store(k, "n", cell, i, j, "zeroinitializer")
    yield "  ret void"


def _cells(k: _Kernel) -> Iterator[tuple[str, int, int]]:
    for i in range(k.rows):
        for j in range(k.vectors):
            yield f"{i}.{j}", i, j


def _at(k: _Kernel, name: str, cell: str, i: int, j: int) -> str:
    return f"  %{name}{cell}.at = getelementptr {k.vector}, ptr %c{i or ''}, i64 {j}"


def _store(k: _Kernel, name: str, cell: str, i: int, j: int, value: str) -> Iterator[str]:
    """A cell of C := value."""
    yield _at(k, name, cell, i, j)
    yield f"  store {k.vector} {value}, ptr %{name}{cell}.at, align {k.dtype.itemsize}"


def _phis(k: _Kernel, name: str, *incoming: tuple[str, str]) -> Iterator[str]:
    """%name<cell> for each cell of the tile. A source (value, block) is %value<cell>, or zero where value is empty."""
    for cell, _, _ in _cells(k):
        sources = (f"[ {f'%{value}{cell}' if value else 'zeroinitializer'}, %{block} ]" for value, block in incoming)
        yield f"  %{name}{cell} = phi {k.vector} {', '.join(sources)}"


def _outer(k: _Kernel) -> Iterator[str]:
    """A run along the innermost axis: all of it, or what a block holds.

    Axes 0 and 1 are `left` turns, of which %i1 counts down to where axis 1 wraps. %rest is what the innermost one still
    has, %room what fits the block, and %fresh tells that no block is in C yet."""
    yield "outer:"
    yield from _phis(k, "o", ("", "entry"), ("s", "next"), *[("", "drained")][: k.blocked])
    starts = [("a.o", "ptr", "%a"), ("b.o", "ptr", "%b"), ("left", "i64", "%n01"), ("i1", "i64", "%n1")]
    if k.blocked:
        starts += [("rest", "i64", "%n2"), ("room", "i64", "%block")]
    for name, kind, start in starts:
        drained = f", [ %{name}.next, %drained ]" if k.blocked else ""
        yield f"  %{name} = phi {kind} [ {start}, %entry ], [ %{name}.next, %next ]{drained}"
    if k.blocked:
        yield "  %fresh = phi i1 [ true, %entry ], [ %fresh, %next ], [ false, %drained ]"
        yield "  %run = call i64 @llvm.umin.i64(i64 %rest, i64 %block)"
    for i in range(k.reach, k.rows, k.reach):
        yield f"  %a.o{i} = getelementptr i8, ptr %a.o{i - k.reach if i > k.reach else ''}, i64 %row.reach"
    if k.ahead:
        yield f"  %tile = mul i64 %row, {k.rows}"
        yield "  %q.o = getelementptr i8, ptr %a.o, i64 %tile"
    yield "  br label %inner"


def _inner(k: _Kernel) -> Iterator[str]:
    """The innermost axis, one k at a time: load a row of B, and for each row of the tile one element of A."""
    size = k.dtype.itemsize
    pointers = range(0, k.rows, k.reach)
    yield "inner:"
    yield from _phis(k, "t", ("o", "outer"), ("s", "inner"))
    for i in pointers:
        yield f"  %p{i} = phi ptr [ %a.o{i or ''}, %outer ], [ %p{i}.next, %inner ]"
    yield "  %pb = phi ptr [ %b.o, %outer ], [ %pb.next, %inner ]"
    yield f"  %i2 = phi i64 [ {'%run' if k.blocked else '%n2'}, %outer ], [ %i2.next, %inner ]"
    if k.ahead:  # into the second cache: the first one has other things to hold
        yield "  %q = phi ptr [ %q.o, %outer ], [ %q.next, %inner ]"
        yield "  call void @llvm.prefetch.p0(ptr %q, i32 0, i32 2, i32 1)"
        yield f"  %q.next = getelementptr i8, ptr %q, i64 {LINE}"
    for j in range(k.vectors):
        yield f"  %w{j}.at = getelementptr {k.vector}, ptr %pb, i64 {j}"
        yield f"  %w{j} = load {k.vector}, ptr %w{j}.at, align {size}"
    for i in range(k.rows):
        yield from _broadcast(k, f"v{i}", f"%p{i - i % k.reach}", i % k.reach)
        for j in range(k.vectors):
            yield from _multiply_add(k, f"{i}.{j}", f"%v{i}", f"%w{j}")
    step = str(size) if k.unit_a else "%a2"
    for i in pointers:
        yield f"  %p{i}.next = getelementptr i8, ptr %p{i}, i64 {step}"
    yield "  %pb.next = getelementptr i8, ptr %pb, i64 %b2"
    yield "  %i2.next = add i64 %i2, -1"
    yield "  %i2.end = icmp eq i64 %i2.next, 0"
    yield "  br i1 %i2.end, label %next, label %inner"


def _broadcast(k: _Kernel, name: str, pointer: str, offset: int) -> Iterator[str]:
    """%name: the element `offset` rows after `pointer` in all lanes. A scale of 3 is not a form of address."""
    at = pointer
    if offset:
        kind, scale = ("i8", "%row3") if offset == 3 else (f"[{offset} x i8]", "%row")
        yield f"  %{name}.at = getelementptr {kind}, ptr {pointer}, i64 {scale}"
        at = f"%{name}.at"
    yield f"  %{name}.x = load {k.element}, ptr {at}, align {k.dtype.itemsize}"
    yield f"  %{name}.y = insertelement {k.vector} poison, {k.element} %{name}.x, i64 0"
    yield f"  %{name} = shufflevector {k.vector} %{name}.y, {k.vector} poison, <{k.lanes} x i32> zeroinitializer"


def _multiply_add(k: _Kernel, cell: str, x: str, y: str) -> Iterator[str]:
    """%s<cell> = %t<cell> + x * y"""
    v = k.vector
    if dtypes.is_float(k.dtype) and k.target.fma:
        suffix = f"v{k.lanes}f{k.dtype.itemsize * 8}"
        yield f"  %s{cell} = call {v} @llvm.fma.{suffix}({v} {x}, {v} {y}, {v} %t{cell})"
        return
    multiply, add = ("fmul", "fadd") if dtypes.is_float(k.dtype) else ("mul", "add")
    yield f"  %m{cell} = {multiply} {v} {x}, {y}"
    yield f"  %s{cell} = {add} {v} %t{cell}, %m{cell}"


def _next(k: _Kernel) -> Iterator[str]:
    """The end of a run: go on along the innermost axis, or else along axis 1, and along axis 0 where axis 1 wraps."""
    turned, less = (".turned", ".less") if k.blocked else (".next", ".next")
    yield "next:"
    yield "  %i1.less = add i64 %i1, -1"
    yield "  %wrap = icmp eq i64 %i1.less, 0"
    yield f"  %i1{turned} = select i1 %wrap, i64 %n1, i64 %i1.less"
    yield f"  %left{less} = add i64 %left, -1"
    for axis in "ab":
        yield f"  %{axis}.step = select i1 %wrap, i64 %{axis}.turn, i64 %{axis}1"
    if k.blocked:
        yield from _next_run()
    for axis in "ab":
        yield f"  %{axis}.o.next = getelementptr i8, ptr %{axis}.o, i64 %{axis}.step{'s' if k.blocked else ''}"
    yield "  %last = icmp eq i64 %left.next, 0"
    if k.blocked:
        yield "  %over = or i1 %last, %full"
    yield f"  br i1 %{'over' if k.blocked else 'last'}, label %drain, label %outer"


def _next_run() -> Iterator[str]:
    """Where the run ends before its axis, it is the axis that goes on."""
    yield "  %rest.less = sub i64 %rest, %run"
    yield "  %turn = icmp eq i64 %rest.less, 0"
    yield "  %rest.next = select i1 %turn, i64 %n2, i64 %rest.less"
    yield "  %i1.next = select i1 %turn, i64 %i1.turned, i64 %i1"
    yield "  %left.next = select i1 %turn, i64 %left.less, i64 %left"
    yield "  %begun = sub i64 %rest, %n2"  # 0 at the beginning of the axis, from where steps to the next turn count
    yield "  %along = select i1 %turn, i64 %begun, i64 %run"
    for axis in "ab":
        yield f"  %{axis}.along = mul i64 %{axis}2, %along"
        yield f"  %{axis}.turned = select i1 %turn, i64 %{axis}.step, i64 0"
        yield f"  %{axis}.steps = add i64 %{axis}.turned, %{axis}.along"
    yield "  %room.less = sub i64 %room, %run"
    yield "  %full = icmp ult i64 %room.less, %most"
    yield "  %room.next = select i1 %full, i64 %block, i64 %room.less"


def _drain(k: _Kernel) -> Iterator[str]:
    """The end of a block: its sums are those of C, or are added to them."""
    yield "drain:"
    yield "  br i1 %fresh, label %put, label %add" if k.blocked else "  br label %put"
    yield "put:"
    if k.ending is not None:
        yield from k.ending.lines
        yield "  ret void"
        return
    for cell, i, j in _cells(k):
        yield from _store(k, "p", cell, i, j, f"%s{cell}")
    if not k.blocked:
        yield "  ret void"
        return
    yield "  br label %drained"
    yield "add:"
    for cell, i, j in _cells(k):
        yield _at(k, "q", cell, i, j)
        yield f"  %q{cell} = load {k.vector}, ptr %q{cell}.at, align {k.dtype.itemsize}"
        yield f"  %q{cell}.sum = fadd {k.vector} %q{cell}, %s{cell}"
        yield f"  store {k.vector} %q{cell}.sum, ptr %q{cell}.at, align {k.dtype.itemsize}"
    yield "  br label %drained"
    yield "drained:"
    yield "  br i1 %last, label %done, label %outer"
    yield "done:"
    yield "  ret void"


def reference(
    a: npt.NDArray[Any], a_row: int, b: npt.NDArray[Any], rows: int, columns: int, loops: tuple[int, ...]
) -> npt.NDArray[Any]:
    """What the kernel adds up, for flat arrays `a` and `b` that begin where its pointers do."""
    extents, a_strides, b_strides = loops[:3], loops[3:6], loops[6:]
    k = np.indices(extents).reshape(3, -1)
    a_at = np.arange(rows)[:, None] * a_row + np.asarray(a_strides) @ k
    b_at = (np.asarray(b_strides) @ k)[:, None] + np.arange(columns)
    result: npt.NDArray[Any] = a[a_at] @ b[b_at]
    return result
