"""The functions behind a `Transpose`, shared by all programs of a module: blocks are transposed in registers.

    void name(ptr to, i64 to_step, ptr source, i64 step, i64 rows, i64 columns)

    to[i * to_step + j] = source[j * step + i]    for i < rows, j < columns

Sizes and steps are in elements, and known when it is called; the two memories do not overlap.

*Blocks.* On x86 two vectors can be interleaved only within *lanes* of 16 bytes. So a lane is what a block is made of:
`side` elements, in `side` vectors. If each lane holds a piece of another column, taken from memory right there (an
insertion costs less than a shuffle), then log2(side) rounds of interleaving transpose all lanes at once, and vectors
of whole rows come out. A taller block loads pieces of several lanes, and needs further rounds to move lanes between
vectors; but it reads more of each cache line at once. That pays, for columns a power of two apart fall into one set
of the cache, and are gone when it comes to the next piece. Within what a cache line holds both ways, blocks next to
each other follow on each other for the same reason.

*Edges.* The last block ends where the matrix does, and overlaps the one before: what both store is the same. Thus
there are no masks, and nothing beyond the matrix is touched. Only where it is smaller than a lane are blocks smaller.

*Dense.* Where all elements of the source are adjacent, rows being few (pixels of three channels), vectors are loaded
as they lie there, and one shuffle of all of them makes each row: LLVM finds good instructions for these. The same goes
for few columns and the destination.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from functools import partial

from stitch.codegen.emit_code import Writer
from stitch.codegen.emit_dims import Dims
from stitch.target import Target

LANE = 16  # bytes
LINE = 64  # bytes of a cache line
DENSE = 8  # the most rows (columns) that are done by shuffles of all of them
ARGUMENTS = "ptr %to, i64 %to_step, ptr %source, i64 %step, i64 %rows, i64 %columns"

Count = int | str  # known now, or a value of the emitted code


def transpose_kernel(
    kernels: MutableMapping[str, str],
    target: Target,
    size: int,
    to_step: int | None,
    step: int | None,
    rows: int | None,
    columns: int | None,
) -> str:
    """The name of a function for elements of `size` bytes, which is added to `kernels`. It need only be right for
    these numbers, as far as they are known, and has no code for what they exclude."""
    f = _Function(target, size)
    emit: Callable[[], None]
    if rows is not None and 1 <= rows <= DENSE and step == rows:
        name, emit = f"split.{rows}", partial(f.split, rows)
    elif columns is not None and 1 <= columns <= DENSE and to_step == columns:
        name, emit = f"merge.{columns}", partial(f.merge, columns)
    else:
        heights, widths = f.sizes(rows, f.tall), f.sizes(columns, f.wide)
        name, emit = f"{'_'.join(map(str, heights))}.{'_'.join(map(str, widths))}", partial(f.blocks, heights, widths)
    name = f"transpose.{size}.{name}"
    if name not in kernels:
        emit()
        bits = target.vector_bits
        attributes = f'nounwind "prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}"'
        kernels[name] = f"define internal void @{name}({ARGUMENTS}) {attributes} {{\n{f.w.text()}\n}}\n"
    return name


class _Function:
    """The text of one function."""

    def __init__(self, target: Target, size: int) -> None:
        self.target, self.size = target, size
        self.w = Writer()
        self.d = Dims(self.w, {})
        self.element = f"i{8 * size}"
        self.side = LANE // size
        self.wide = target.vector_bits // (8 * size)
        self.tall = self.side
        while 2 * self.tall <= min(self.wide, target.vector_registers // 2):
            self.tall *= 2
        self.small = (4, 1) if self.side > 4 else (1,)
        self.rows, self.columns = "%rows", "%columns"

    # ------------------------------------------------------------------ functions

    def sizes(self, n: int | None, most: int) -> tuple[int, ...]:
        """The sizes of blocks that n rows or columns may need: the largest for all that they fill, then a lane's; or,
        if they are fewer than a lane, those of the largest small one."""
        large = tuple(dict.fromkeys((most, self.side)))
        if n is None:
            return (*large, *self.small)
        if n < self.side:
            return (1 << n.bit_length() - 1,) if n > 0 else ()
        return tuple(s for s in large if s <= n and (s == most or n % most))

    def blocks(self, heights: tuple[int, ...], widths: tuple[int, ...]) -> None:
        """The general case."""
        side, tall, wide, line = self.side, self.tall, self.wide, LINE // self.size
        high = self.filled(self.rows, tall)
        broad = self.chosen(self.reaches(self.rows, side), self.filled(self.columns, wide), 0)

        def inside(i0: Count, j0: Count) -> None:
            """What a cache line holds both ways."""
            i1, j1 = self.least(self.sum(i0, line), high), self.least(self.sum(j0, line), broad)
            self.each(i0, i1, tall, j0, j1, wide)

        if tall in heights and wide in widths:
            if tall == wide == line:
                self.each(0, high, tall, 0, broad, wide)
            else:
                self.over(0, high, line, lambda i: self.over(0, broad, line, lambda j: inside(i, j)))
        if side in heights and side < tall and wide in widths:
            self.each(high, self.rows, side, 0, broad, wide)
        for height, low in self.choices(self.rows, self.lower(heights), 0):
            for width, right in self.choices(self.columns, self.lower(widths), broad):
                if height < side or width < side or (side in widths and side < wide):
                    self.each(0, low, height, broad, right, width)

    def split(self, rows: int) -> None:
        """Rows of which the source is a dense matrix."""
        for width, stop in self.choices(self.columns, self.vectors(), 0):

            def part(j: Count, n: int = width) -> None:
                at = self.least(j, self.sum(self.columns, -n))
                x = self.load(self.at("%source", self.d.mul(str(at), str(rows))), rows * n)
                for k in range(rows):
                    y = self.shuffle(x, "poison", rows * n, range(k, rows * n, rows))
                    self.store(y, n, self.at(self.step("%to", "%to_step", k), at))

            self.over(0, stop, width, part)

    def merge(self, columns: int) -> None:
        """Columns that become a dense matrix."""
        for height, stop in self.choices(self.rows, self.vectors(), 0):

            def part(i: Count, n: int = height) -> None:
                at = self.least(i, self.sum(self.rows, -n))
                parts = [self.load(self.at(self.step("%source", "%step", k), at), n) for k in range(columns)]
                parts += ["poison"] * ((1 << (columns - 1).bit_length()) - columns)
                order = [k * n + i for i in range(n) for k in range(columns)]
                y = self.shuffle(self.joined(parts, n), "poison", len(parts) * n, order)
                self.store(y, columns * n, self.at("%to", self.d.mul(str(at), str(columns))))

            self.over(0, stop, height, part)

    def vectors(self) -> tuple[int, ...]:
        """Sizes of vectors of dense elements. Narrow ones are shuffled across lanes only by late instruction sets;
        elsewhere wide vectors take time to compile, and bring nothing."""
        across = {1: "avx512vbmi", 2: "avx512bw"}.get(self.size)
        wide = self.wide if across is None or self.target.has(across) else self.side
        return tuple(dict.fromkeys((wide, self.side, 1)))

    def lower(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """A lane and what is smaller, of these sizes."""
        lane = (self.side,) if sizes[:1] >= (self.side,) else ()
        return (*lane, *(s for s in sizes if s < self.side))

    # ------------------------------------------------------------------ counts and loops

    def sum(self, a: Count, b: Count) -> Count:
        return a + b if isinstance(a, int) and isinstance(b, int) else self.d.add(str(a), str(b))

    def least(self, a: Count, b: Count) -> str:
        below = self.w.pure(f"icmp slt i64 {a}, {b}", str(a), str(b))
        return self.d.select(below, str(a), str(b))

    def chosen(self, condition: str, a: Count, b: Count) -> str:
        return self.d.select(condition, str(a), str(b))

    def reaches(self, n: Count, size: int, over: int | None = None) -> str:
        """Whether size <= n, and n < over."""
        enough = self.w.pure(f"icmp sge i64 {n}, {size}", str(n))
        if over is None:
            return enough
        few = self.w.pure(f"icmp slt i64 {n}, {over}", str(n))
        return self.w.pure(f"and i1 {enough}, {few}", enough, few)

    def choices(self, n: Count, sizes: tuple[int, ...], start: Count) -> list[tuple[int, Count]]:
        """The sizes, each with where it stops: at n if it is the largest that fits n, else where it starts."""
        over = (None, *sizes)
        return [(s, self.chosen(self.reaches(n, s, more), n, start)) for s, more in zip(sizes, over, strict=False)]

    def filled(self, n: Count, size: int) -> str:
        """Where the blocks of the largest size end. If a lane is the largest they go on to the end, and overlap."""
        if size == self.side:
            return self.chosen(self.reaches(n, size), n, 0)
        whole = self.w.pure(f"and i64 {n}, {-size}", str(n))
        return self.chosen(self.reaches(n, size), whole, 0)

    def over(self, start: Count, stop: Count, by: int, body: Callable[[Count], None]) -> None:
        def step(at: Count, _: Sequence[str]) -> Sequence[str]:
            body(at)
            return []

        self.w.repeat(start, stop, by, [], step)

    def each(self, i0: Count, i1: Count, height: int, j0: Count, j1: Count, width: int) -> None:
        """Blocks in rows [i0, i1) and columns [j0, j1): along the way on which there are more of them."""
        if width <= self.side == height:
            self.over(j0, j1, width, lambda j: self.over(i0, i1, height, lambda i: self.block(i, j, height, width)))
        else:
            self.over(i0, i1, height, lambda i: self.over(j0, j1, width, lambda j: self.block(i, j, height, width)))

    # ------------------------------------------------------------------ memory

    def at(self, p: str, offset: Count) -> str:
        return self.w.pure(f"getelementptr {self.element}, ptr {p}, i64 {offset}", p, str(offset))

    def step(self, p: str, step: str, k: int) -> str:
        """The address k steps after p. x86 has it in one instruction after each fourth: it adds steps 1 or 2 times,
        and 3 are in a register."""
        one, three, four = (self.d.mul(step, str(n * self.size)) for n in (1, 3, 4))
        for _ in range(k // 4):
            p = self.w.pure(f"getelementptr i8, ptr {p}, i64 {four}", p, four)
        match k % 4:
            case 0:
                return p
            case 3:
                return self.w.pure(f"getelementptr i8, ptr {p}, i64 {three}", p, three)
            case few:
                return self.w.pure(f"getelementptr [{few} x i8], ptr {p}, i64 {one}", p, one)

    def load(self, p: str, count: int) -> str:
        """A vector. Nothing stores to the source, so that loads of it may move."""
        return self.w.pure(f"load <{count} x {self.element}>, ptr {p}, align {self.size}", p)

    def store(self, x: str, count: int, p: str) -> None:
        self.w.effect(f"store <{count} x {self.element}> {x}, ptr {p}, align {self.size}")

    def load_part(self, p: str, count: int) -> str:
        """The first elements of a lane, by one integer. The others do not matter."""
        bits = 8 * self.size * count
        wide = f"<{8 * LANE // bits} x i{bits}>"
        x = self.w.pure(f"load i{bits}, ptr {p}, align {self.size}", p)
        y = self.w.pure(f"insertelement {wide} poison, i{bits} {x}, i64 0", x)
        return self.w.pure(f"bitcast {wide} {y} to <{self.side} x {self.element}>", y)

    def store_part(self, x: str, count: int, p: str) -> None:
        bits = 8 * self.size * count
        wide = f"<{8 * LANE // bits} x i{bits}>"
        y = self.w.pure(f"bitcast <{self.side} x {self.element}> {x} to {wide}", x)
        z = self.w.pure(f"extractelement {wide} {y}, i64 0", y)
        self.w.effect(f"store i{bits} {z}, ptr {p}, align {self.size}")

    # ------------------------------------------------------------------ vectors

    def shuffle(self, a: str, b: str, count: int, order: Sequence[int]) -> str:
        """Elements of two vectors of `count` each, by number."""
        if a == b == "poison":
            return a
        kind, mask = f"<{count} x {self.element}>", ", ".join(f"i32 {k}" for k in order)
        return self.w.pure(f"shufflevector {kind} {a}, {kind} {b}, <{len(order)} x i32> <{mask}>", a, b)

    def joined(self, parts: list[str], count: int) -> str:
        """One vector of a power of two of them."""
        while len(parts) > 1:
            parts = [self.shuffle(a, b, count, range(2 * count)) for a, b in zip(parts[::2], parts[1::2], strict=True)]
            count *= 2
        return parts[0]

    def block(self, i: Count, j: Count, height: int, width: int) -> None:
        """The block at (i, j), or where it ends with the matrix if it would not before."""
        i, j = self.least(i, self.sum(self.rows, -height)), self.least(j, self.sum(self.columns, -width))
        side = self.side
        p = self.at(self.at("%source", self.d.mul("%step", j)), i)
        load = self.load if height >= side else self.load_part
        pieces = [load(self.step(p, "%step", k), height) for k in range(width)] + ["poison"] * (side - width)
        high = max(1, height // side)  # lanes in a piece
        lanes = len(pieces) // side
        together = len(pieces) // high  # pieces from which `side` vectors are made
        groups = [pieces[k : k + together] for k in range(0, len(pieces), together)]
        made = [self.turned([self.joined(g[k::side], high * side) for k in range(side)], lanes) for g in groups]
        if high > 1 and self.target.is_x86:
            made = [[self.apart(v, lanes * side) for v in turned] for turned in made]
        rows = [self.spread(list(same), lanes) for same in zip(*made, strict=True)]
        q = self.at(self.at("%to", self.d.mul("%to_step", i)), j)
        for k in range(height):
            x, to = rows[k % side][k // side], self.step(q, "%to_step", k)
            if width >= side:
                self.store(x, width, to)
            else:
                self.store_part(x, width, to)

    def apart(self, x: str, count: int) -> str:
        """The vector itself. LLVM does not look through this in its search for better shuffles, of which there are
        none, and takes little more than half of the time."""
        kind = f"<{count} x {self.element}>"
        n = count * self.size // 4
        floats = f"<{n} x float>"
        y = self.w.pure(f"bitcast {kind} {x} to {floats}", x)
        z = self.w.pure(f"call {floats} @llvm.arithmetic.fence.v{n}f32({floats} {y})", y)
        return self.w.pure(f"bitcast {floats} {z} to {kind}", z)

    def turned(self, vectors: list[str], lanes: int) -> list[str]:
        """Transposes each lane of `side` vectors: each round interleaves the first half of them with the second."""
        side, half = self.side, self.side // 2
        count = side * lanes
        orders = [
            [x for lane in range(start, count, side) for k in range(lane, lane + half) for x in (k, count + k)]
            for start in (0, half)
        ]
        for _ in range(side.bit_length() - 1):
            pairs = zip(vectors[:half], vectors[half:], strict=True)
            vectors = [self.shuffle(a, b, count, order) for a, b in pairs for order in orders]
        return vectors

    def spread(self, vectors: list[str], lanes: int) -> list[str]:
        """Transposes vectors and lanes: each round gathers the even lanes of neighbours, and the odd ones."""
        side = self.side
        orders = [[lane * side + k for lane in range(odd, 2 * lanes, 2) for k in range(side)] for odd in (0, 1)]
        for _ in range(len(vectors).bit_length() - 1):
            pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
            vectors = [self.shuffle(a, b, side * lanes, order) for order in orders for a, b in pairs]
        return vectors
