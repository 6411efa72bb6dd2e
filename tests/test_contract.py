"""Micro-kernels: compiled for each target that runs here and compared with numpy; the others' assembly is read."""

import ctypes
import math
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt
import pytest

from stitch import compiler, dims, dtypes
from stitch.codegen import assemble, kernels
from stitch.codegen.contract import (
    TYPES,
    efficiency,
    emit_micro_kernel,
    fits,
    main_tiles,
    reference,
    tile_shapes,
)
from stitch.codegen.emit_kernels import tile_kernel
from stitch.codegen.loops import Contract, walk
from stitch.codegen.sums import BLOCK_BITS, block_of, runs
from stitch.codegen.tiling import choose
from stitch.evaluate import evaluate
from stitch.graph import Builder
from stitch.stitching.trace import Flow
from stitch.target import NAMES, Target, from_host, parse
from tests import pipeline

Array = npt.NDArray[Any]

llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()

HOST = from_host(llvm.get_process_triple(), llvm.get_host_cpu_name(), dict(llvm.get_host_cpu_features()))


def runs_here(target: Target) -> bool:
    return target.arch == HOST.arch and all(f == "+sse2" or f in HOST.features for f in target.features)


HERE = {"host": HOST, **{name: target for name, target in NAMES.items() if runs_here(target)}}
DTYPES = [d.name for d in TYPES]


def machine(target: Target) -> llvm.TargetMachine:
    where = llvm.Target.from_triple(target.triple)
    features = ",".join(target.features)
    return where.create_target_machine(cpu=target.cpu, features=features, opt=2, reloc="pic", codemodel="small")


@cache
def library(
    name: str, dtype: np.dtype, short: bool = False, ahead: bool = False
) -> tuple[object, dict[tuple[int, int, bool], Callable[..., None]]]:
    """Every tile of a target and dtype, compiled together; the first of the pair keeps the code alive."""
    target = HERE[name]
    shapes = sorted({shape for main in main_tiles(target, dtype) for shape in tile_shapes(target, dtype, main)})
    wanted = {(*shape, unit): f"k{shape[0]}_{shape[1]}_{int(unit)}" for shape in shapes for unit in (True, False)}
    emit = partial(emit_micro_kernel, short=short, ahead=ahead)
    text = "\n".join(emit(label, target, dtype, *key) for key, label in wanted.items())
    module = llvm.parse_assembly(text)
    module.verify()
    builder = llvm.JITLibraryBuilder().add_object_img(machine(target).emit_object(module))
    for label in wanted.values():
        builder.export_symbol(label)
    compiler = llvm.create_lljit_compiler()
    tracker = builder.link(compiler, "kernels")
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 6)
    return (compiler, tracker), {key: kind(tracker[label]) for key, label in wanted.items()}


def numbers(count: int, dtype: np.dtype, seed: int) -> Array:
    """Small integers: every sum is exact, so that any order of adding gives the same."""
    return np.random.default_rng(seed).integers(-4, 5, count).astype(dtype)


def at(array: Array) -> int:
    return int(array.ctypes.data)


# name: (row stride of A, loops), with NR for the width of B's rows
NESTS: dict[str, Callable[[int], tuple[int, list[int]]]] = {
    "matmul": lambda nr: (37, [1, 1, 37, 0, 0, 1, 0, 0, nr]),
    "matmul, B in place": lambda nr: (19, [1, 1, 17, 0, 0, 1, 0, 0, nr + 5]),
    "transposed A": lambda nr: (1, [1, 1, 13, 0, 0, 20, 0, 0, nr]),
    "convolution": lambda nr: (6, [3, 2, 5, 120, 6, 1, 10 * nr, 5 * nr, nr]),
    "strided convolution, channels first": lambda nr: (2, [3, 2, 4, 40, 1, 130, 8 * nr, nr, 2 * nr]),
    "blocks": lambda nr: (0, [2, 3, 4, 24, 4, 1, 12 * nr, 4 * nr, nr]),
    "backwards": lambda nr: (9, [1, 2, 3, 0, 3, 1, 0, -3 * nr, nr]),
    "nothing": lambda nr: (9, [2, 0, 3, 1, 1, 1, 1, 1, 1]),
    "nothing innermost": lambda nr: (9, [2, 2, 0, 1, 1, 1, 1, 1, 1]),
    "nothing outermost": lambda nr: (9, [0, 2, 2, 1, 1, 1, 1, 1, 1]),
}


@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("name", HERE)
def test_against_numpy(name: str, dtype_name: str, nest: str) -> None:
    dtype = dtypes.parse(dtype_name)
    _, made = library(name, dtype)
    for (rows, vectors, unit), kernel in made.items():
        width = vectors * HERE[name].lanes(dtype)
        a_row, loops = NESTS[nest](width)
        if unit and loops[5] != 1:
            continue
        a, b = numbers(2000, dtype, 1), numbers(60 * (width + 5), dtype, 2)
        # One element in: nothing is aligned. "backwards" starts in the middle of B.
        a, b = a[1:], b[1 + (3 * width if nest == "backwards" else 0) :]
        c_row = width + 3
        before = numbers(rows * c_row + 1, dtype, 3)[1:]
        packed = np.array(loops, np.int64)
        if nest == "backwards":
            want = sum_backwards(a, a_row, b, rows, width, loops)
        else:
            want = reference(a, a_row, b, rows, width, tuple(loops))
        c = before.copy()
        kernel(at(a), a_row, at(b), at(c), c_row, at(packed))
        expected = before.copy()
        tile = np.lib.stride_tricks.as_strided(expected, (rows, width), (c_row * dtype.itemsize, dtype.itemsize))
        tile[...] = want
        np.testing.assert_array_equal(c, expected, err_msg=f"{rows}x{vectors} unit={unit}")


def sum_backwards(a: Array, a_row: int, b: Array, rows: int, width: int, loops: list[int]) -> Array:
    """`reference` cannot reach before the start of an array: move its start."""
    whole = b.base
    assert isinstance(whole, np.ndarray)
    moved = whole[1:]
    extents, step = loops[:3], 3 * width
    later = reference(a[loops[4] :], a_row, moved, rows, width, (1, 1, extents[2], *loops[3:]))
    first = reference(a, a_row, moved[step:], rows, width, (1, 1, extents[2], *loops[3:]))
    total: Array = first + later
    return total


def _run(
    kernel: Callable[..., None], rows: int, width: int, a: Array, b: Array, strides: tuple[int, ...], start: int,
    extents: tuple[int, ...],
) -> Array:  # fmt: skip
    c = np.full((rows, width), np.nan, np.float32)
    loops = np.array([*extents, *strides, *(s * b.shape[1] for s in strides)], np.int64)
    kernel(at(a[:, start:]), a.shape[1], at(b[start:]), at(c), width, at(loops))
    return c


@pytest.mark.parametrize("extents", [(1, 1, 100), (1, 1, 2000), (3, 3, 300), (40, 31, 1), (2, 1, 1400)])
@pytest.mark.parametrize("name", HERE)
def test_a_row_has_the_same_bits_in_every_tile(name: str, extents: tuple[int, int, int]) -> None:
    """And they are those of its blocks, each by itself, added one after the other."""
    _, made = library(name, dtypes.FLOAT32)
    random = np.random.default_rng(5)
    k, lanes = math.prod(extents), HERE[name].lanes(dtypes.FLOAT32)
    a, nr = random.standard_normal((14, k), np.float32), lanes * 4
    b = random.standard_normal((k, nr), np.float32)
    strides = (extents[1] * extents[2], extents[2], 1)
    found = []
    for (rows, vectors, _), kernel in made.items():
        run = partial(_run, kernel, rows, vectors * lanes, a, b, strides)
        c = run(0, extents)
        np.testing.assert_allclose(c, a[:rows] @ b[:, : vectors * lanes], rtol=1e-3, atol=1e-3)
        total, start, length = None, 0, 0
        for _, piece, full in runs(extents):
            length += len(piece)
            if full or start + length == k:
                part = run(start, (1, 1, length))
                assert length <= block_of(k)
                total = part if total is None else total + part
                start, length = start + length, 0
        np.testing.assert_array_equal(c, total)
        found.append(c[0, :lanes].copy())
    for bits in found:
        np.testing.assert_array_equal(bits, found[0])


@pytest.mark.parametrize("extents", [(1, 1, 100), (3, 3, 100), (1, 1, 1 << BLOCK_BITS)])
@pytest.mark.parametrize("name", HERE)
def test_sums_of_one_block_have_kernels_with_the_same_bits(name: str, extents: tuple[int, int, int]) -> None:
    random = np.random.default_rng(5)
    k, lanes = math.prod(extents), HERE[name].lanes(dtypes.FLOAT32)
    a, b = random.standard_normal((14, k), np.float32), random.standard_normal((k, lanes * 4), np.float32)
    strides = (extents[1] * extents[2], extents[2], 1)
    (_, long), (_, short) = library(name, dtypes.FLOAT32), library(name, dtypes.FLOAT32, True)
    for (rows, vectors, unit), kernel in long.items():
        want, got = (
            _run(f, rows, vectors * lanes, a, b, strides, 0, extents) for f in (kernel, short[rows, vectors, unit])
        )
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", HERE)
def test_infinities_and_nans_pass(name: str) -> None:
    _, made = library(name, dtypes.FLOAT32)
    (rows, vectors, _), kernel = next(item for item in made.items() if item[0][2])
    width = vectors * HERE[name].lanes(dtypes.FLOAT32)
    a, b = np.ones((rows, 2), np.float32), np.ones((2, width), np.float32)
    b[0, :3], b[1, :3] = [np.inf, np.inf, np.nan], [1, -np.inf, 1]
    c = np.zeros((rows, width), np.float32)
    loops = np.array([1, 1, 2, 0, 0, 1, 0, 0, width], np.int64)
    kernel(at(a), 2, at(b), at(c), width, at(loops))
    np.testing.assert_array_equal(c[0, :4], np.array([np.inf, np.nan, np.nan, 2], np.float32))


def innermost(assembly: str) -> str:
    """The body of the one block that jumps to itself."""
    parts = re.split(r"^(\.LBB\d+_\d+):.*$", assembly, flags=re.MULTILINE)
    found = []
    for label, block in zip(parts[1::2], parts[2::2], strict=True):
        jump = re.search(r"^\s*(j\w+|b\.\w+|cbn?z\s+\w+,)\s*" + re.escape(label) + r"\b", block, re.MULTILINE)
        if jump:
            found.append(block[: jump.end()])
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_no_spills_in_the_innermost_loop(name: str, dtype_name: str) -> None:
    target, dtype = parse(name), dtypes.parse(dtype_name)
    for tile in main_tiles(target, dtype):
        for unit in (True, False):
            module = llvm.parse_assembly(emit_micro_kernel("kernel", target, dtype, *tile, unit))
            body = innermost(machine(target).emit_assembly(module))
            assert not re.search(r"\(%[re]sp|\[sp", body), f"{tile}\n{body}"
            if dtypes.is_float(dtype) and target.fma:
                fused = "fmla" if name == "neon" else "vfmadd"
                assert len(re.findall(fused, body)) == tile[0] * tile[1]


@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_tiles(name: str, dtype_name: str) -> None:
    target, dtype = parse(name), dtypes.parse(dtype_name)
    shapes = tile_shapes(target, dtype)
    main = main_tiles(target, dtype)[0]
    assert shapes[0] == main
    assert len(set(shapes)) == len(shapes)
    assert {vectors for _, vectors in shapes} == set(range(1, main[1] + 1))
    assert all((1, vectors) in shapes for _, vectors in shapes)
    for shape in shapes:
        assert fits(target, dtype, *shape)
        assert 0 < efficiency(target, dtype, *shape) <= efficiency(target, dtype, *main)


def test_choice_of_a_tile() -> None:
    target = parse("avx512")
    for rows, columns, stride in ((128, 768, 768), (56, 64, 64), (7, 512, 512), (6, 64, 64), (1, 32, 32)):
        height, vectors = choose(rows, columns, stride, target, dtypes.FLOAT32)
        assert fits(target, dtypes.FLOAT32, height, vectors)
        assert rows % height == 0, "no rows are wasted where none need be"
        assert columns % (16 * vectors) == 0, "nor columns"
    assert choose(56, 64, 3072, target, dtypes.FLOAT32)[0] <= 8, "high tiles suffer where rows are 4 KB apart"


def test_large_tiles_do_not_fit() -> None:
    target = parse("avx2")
    assert not fits(target, dtypes.FLOAT32, 8, 2)
    assert efficiency(target, dtypes.FLOAT32, 8, 2) == 0.5


def test_what_cannot_be_emitted() -> None:
    with pytest.raises(ValueError, match="no micro-kernel for float16; there is one for float32, float64"):
        emit_micro_kernel("k", HOST, dtypes.FLOAT16, 1, 1, True)
    with pytest.raises(ValueError, match="0x2 vectors is empty"):
        emit_micro_kernel("k", HOST, dtypes.FLOAT32, 0, 2, True)


def test_linkage() -> None:
    text = emit_micro_kernel("k", HOST, dtypes.FLOAT32, 1, 1, True, "internal")
    assert text.startswith("define internal void @k(ptr %a, ")


def test_few_rows_take_one_kernel() -> None:
    """A clipped tile has a height of its own for two to four rows, rather than reading its panel once for each half."""
    target = parse("avx512")
    for rows, vectors in ((13, 2), (8, 2), (6, 4)):
        found: dict[str, str] = {}
        tile_kernel(found, target, np.dtype(np.float32), rows, vectors, True, True, False)
        heights = {int(name.split(".")[2].split("x")[0]) for name in found if name.startswith("contract.")}
        assert heights >= {1, 2, 3, 4, rows}


@pytest.mark.parametrize("nest", ["matmul", "convolution", "nothing innermost"])
@pytest.mark.parametrize("short", [False, True], ids=["blocks", "short"])
def test_asking_ahead_changes_nothing(nest: str, short: bool) -> None:
    """Not even where what is asked for is not there: the operands end with what is read."""
    dtype = np.dtype(np.float32)
    asking = library("host", dtype, short, True)[1]
    for (rows, vectors, unit), plain in library("host", dtype, short)[1].items():
        width = vectors * HOST.lanes(dtype)
        a_row, loops = NESTS[nest](width)
        a, b = numbers(1000, dtype, 1), numbers(60 * width, dtype, 2)
        found = [np.full((rows, width), 7, dtype) for _ in range(2)]
        for c, kernel in zip(found, (plain, asking[rows, vectors, unit]), strict=True):
            kernel(at(a), a_row, at(b), at(c), width, at(np.array(loops, np.int64)))
        np.testing.assert_array_equal(found[0], found[1])


def test_only_whole_tiles_ask_ahead() -> None:
    found: dict[str, str] = {}
    tile_kernel(found, parse("avx512"), np.dtype(np.float32), 12, 2, True, True, False, True)
    asking = {name for name, text in found.items() if "@llvm.prefetch" in text}
    assert asking == {name for name in found if name.startswith("contract.float32.12x2") and "clipped" not in name}


@pytest.mark.parametrize(
    ("rows", "depth", "apart", "asks"),
    [
        (1500, 384, 384, True),
        (dims.symbol("n"), 384, 384, True),
        (12, 384, 384, False),  # one tile
        (1500, 64, 384, False),  # the next tile is further away than the lines that this one has time for
    ],
    ids=str,
)
def test_tiles_ask_for_rows_that_lie_close(rows: dims.Dim, depth: int, apart: int, asks: bool) -> None:
    b = Builder()
    x = b.input("x", dtypes.FLOAT32, (rows, apart))
    w = b.const(numbers(depth * 96, np.dtype(np.float32), 1).reshape(depth, 96))
    y = b.contract(b.slice(x, (0, 0), (rows, depth)), w, [0, 1], [1, 2], [0, 2])
    stitched = pipeline.cut(b.finish({"y": y}))
    programs = [kernels.lower(k, Flow(stitched.graph), parse("avx512")).program for k in stitched.kernels]
    found = [s for p in programs for phase in p.phases for s in walk(phase.body) if isinstance(s, Contract)]
    assert [s.ahead for s in found] == [asks]


def test_weights_are_read_once_for_all_batches_of_few_rows() -> None:
    """Heads beside each other, summed by a projection: where the rows of a batch may be one, panels are outside."""
    b, n, s = Builder(), dims.symbol("n"), dims.symbol("s")
    x = b.input("x", dtypes.FLOAT32, (n, 8, s, 64))
    weights = np.random.default_rng(0).standard_normal((8, 64, 640), np.float32)
    graph = b.finish({"y": b.contract(x, b.const(weights), [0, 1, 2, 3], [1, 3, 4], [0, 2, 4])})
    (low,) = assemble.lower(compiler.cut(graph, NAMES["avx512"]), NAMES["avx512"]).values()
    panel, batch, _ = low.program.phases[-1].axes
    assert isinstance(panel.extent, int)
    assert batch.extent == n


def test_rows_of_a_tile_are_neighbouring_pixels_rather_than_images() -> None:
    """With all extents open: of an image in memory with its batch innermost but one, as a gather of rows leaves it."""
    n, h, w = (dims.symbol(s) for s in "nhw")
    b = Builder()
    x = b.input("x", np.dtype(np.float32), (w, h, n, 8))
    window = b.window(b.transpose(x, [2, 1, 0, 3]), [1, 2], [3, 3], [1, 1], [1, 1])
    weights = b.const(numbers(16 * 8 * 9, np.dtype(np.float32), 1).reshape(16, 8, 3, 3))
    y = b.contract(window, weights, [0, 1, 2, 3, 4, 5], [6, 3, 4, 5], [0, 1, 2, 6])
    stitched = pipeline.cut(b.finish({"y": y}))
    programs = [kernels.lower(k, Flow(stitched.graph), parse("avx512")).program for k in stitched.kernels]
    found = [s for p in programs for phase in p.phases for s in walk(phase.body) if isinstance(s, Contract)]
    assert [dims.quotient(s.a_row, n) for s in found] == [8]


@pytest.mark.parametrize("axes", [1, 2, 3, 4])
def test_windows_over_more_axes_than_a_kernel_has_loops(axes: int) -> None:
    """Taps along the last axis go on with the channels: three spatial axes need no copy of their windows."""
    b, n = Builder(), dims.symbol("n")
    x = b.input("x", dtypes.FLOAT32, (n, *range(4, 4 + axes), 5))
    weights = b.const(numbers(6 * 5 * 2**axes, np.dtype(np.float32), 1).reshape(6, 5, *[2] * axes))
    spatial, taps = range(1, 1 + axes), range(axes + 3, 2 * axes + 3)
    window = b.window(x, spatial, [2] * axes, [1] * axes, [1] * axes)
    k, m = axes + 1, axes + 2
    graph = b.finish({"y": b.contract(window, weights, [0, *spatial, k, *taps], [m, k, *taps], [0, *spatial, m])})
    copies = [k for k in pipeline.cut(graph).kernels if "contract" not in {node.prim for node in k.nodes}]
    assert bool(copies) == (axes > 3)
    feeds = {"x": numbers(3 * math.prod(range(4, 4 + axes)) * 5, np.dtype(np.float32), 2).reshape(3, *x.shape[1:])}
    (y,) = pipeline.native(graph, feeds)
    np.testing.assert_array_equal(y, evaluate(graph, feeds)[0])
