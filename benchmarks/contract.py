"""Measure the contraction micro-kernels beside the multiply-add peak of the same core.

    python -m benchmarks.contract [--target avx2] [--dtype float32] [--tiles 14x2,8x3] [--only matmul]

Matmuls read A in place and B from a packed panel; convolutions are 3x3, channels last, over a padded image. `peak` is
the share of a loop of nothing but multiply-adds, measured again beside every row, since the clock and the neighbours
change. `used` is the share of a tile's work that is not beyond the edge of the image or of the channels.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt

from stitch import dtypes
from stitch.codegen.contract import TYPES, efficiency, emit_micro_kernel, main_tiles
from stitch.target import Target, from_host, parse

Function = Callable[..., None]
Array = npt.NDArray[Any]

# Calls the kernel over a grid of tiles, three axes with strides in bytes for A, B and C, `turns` times.
DRIVER = """
define void @drive(ptr %kernel, ptr %grid, i64 %turns, ptr %a, i64 %ar, ptr %b, ptr %c, i64 %cr, ptr %loops) {
entry:
  br label %turn
turn:
  %t = phi i64 [ %turns, %entry ], [ %t.next, %turn.end ]
  br label %l0
BODY
turn.end:
  %t.next = add i64 %t, -1
  %t.done = icmp eq i64 %t.next, 0
  br i1 %t.done, label %exit, label %turn
exit:
  ret void
}
"""


def driver() -> str:
    lines, ends = [], []
    for axis in range(3):
        before = "turn" if axis == 0 else f"l{axis - 1}"
        lines += [f"l{axis}:", f"  %i{axis} = phi i64 [ 0, %{before} ], [ %i{axis}.next, %e{axis} ]"]
        for operand, which in (("a", 1), ("b", 2), ("c", 3)):
            outer = f"%{operand}{axis - 1}" if axis else f"%{operand}"
            at = f"%{operand}{axis}"
            lines += [f"  {at}.at = getelementptr i64, ptr %grid, i64 {3 * which + axis}"]
            lines += [f"  {at}.s = load i64, ptr {at}.at", f"  {at}.o = mul i64 {at}.s, %i{axis}"]
            lines += [f"  {at} = getelementptr i8, ptr {outer}, i64 {at}.o"]
        if axis < 2:
            lines.append(f"  br label %l{axis + 1}")
        done = f"e{axis - 1}" if axis else "turn.end"
        ends.append(
            f"e{axis}:\n  %i{axis}.next = add i64 %i{axis}, 1\n"
            f"  %n{axis}.at = getelementptr i64, ptr %grid, i64 {axis}\n"
            f"  %n{axis} = load i64, ptr %n{axis}.at\n  %d{axis} = icmp eq i64 %i{axis}.next, %n{axis}\n"
            f"  br i1 %d{axis}, label %{done}, label %l{axis}"
        )
    call = "  call void %kernel(ptr %a2, i64 %ar, ptr %b2, ptr %c2, i64 %cr, ptr %loops)\n  br label %e2"
    return DRIVER.replace("BODY", "\n".join([*lines, call, *reversed(ends)]))


def peak_loop(target: Target, dtype: np.dtype) -> str:
    """`turns` times 24 (or 12) independent multiply-adds."""
    v = f"<{target.lanes(dtype)} x {TYPES[dtype]}>"
    count = 24 if target.vector_registers == 32 else 12
    lines = [
        "define void @peak(ptr %x, i64 %turns) {",
        "entry:",
        f"  %y = load {v}, ptr %x, align 8",
        "  br label %loop",
    ]
    lines += ["loop:", "  %t = phi i64 [ %turns, %entry ], [ %t.next, %loop ]"]
    lines += [f"  %p{i} = phi {v} [ %y, %entry ], [ %q{i}, %loop ]" for i in range(count)]
    for i in range(count):
        if dtypes.is_float(dtype) and target.fma:
            name = f"@llvm.fma.v{target.lanes(dtype)}f{dtype.itemsize * 8}"
            lines.append(f"  %q{i} = call {v} {name}({v} %p{i}, {v} %y, {v} %y)")
        else:
            multiply, add = ("fmul", "fadd") if dtypes.is_float(dtype) else ("mul", "add")
            lines += [f"  %m{i} = {multiply} {v} %p{i}, %y", f"  %q{i} = {add} {v} %m{i}, %y"]
    lines += ["  %t.next = add i64 %t, -1", "  %d = icmp eq i64 %t.next, 0", "  br i1 %d, label %exit, label %loop"]
    lines += ["exit:"]
    lines += [
        f"  %x{i} = getelementptr {v}, ptr %x, i64 {i}\n  store {v} %q{i}, ptr %x{i}, align 8" for i in range(count)
    ]
    return "\n".join([*lines, "  ret void", "}", ""])


def read_loop(target: Target) -> str:
    """Read `count` blocks of eight vectors."""
    v = f"<{target.vector_bits // 32} x i32>"
    lines = ["define void @read(ptr %x, i64 %count, ptr %out) {", "entry:", "  br label %loop", "loop:"]
    lines += [
        "  %t = phi i64 [ %count, %entry ], [ %t.next, %loop ]",
        "  %p = phi ptr [ %x, %entry ], [ %p.next, %loop ]",
    ]
    lines += [f"  %s{i} = phi {v} [ zeroinitializer, %entry ], [ %r{i}, %loop ]" for i in range(8)]
    for i in range(8):
        lines += [f"  %p{i} = getelementptr {v}, ptr %p, i64 {i}", f"  %v{i} = load {v}, ptr %p{i}, align 4"]
        lines += [f"  %r{i} = xor {v} %s{i}, %v{i}"]
    lines += [f"  %p.next = getelementptr {v}, ptr %p, i64 8", "  %t.next = add i64 %t, -1"]
    lines += ["  %d = icmp eq i64 %t.next, 0", "  br i1 %d, label %exit, label %loop", "exit:"]
    lines += [
        f"  %o{i} = getelementptr {v}, ptr %out, i64 {i}\n  store {v} %r{i}, ptr %o{i}, align 4" for i in range(8)
    ]
    return "\n".join([*lines, "  ret void", "}", ""])


def machine(target: Target, opt: int = 2) -> llvm.TargetMachine:
    where = llvm.Target.from_triple(target.triple)
    features = ",".join(target.features)
    return where.create_target_machine(cpu=target.cpu, features=features, opt=opt, reloc="pic", codemodel="small")


@dataclass
class Library:
    """Compiled text; `tracker` keeps its code alive."""

    text: str
    target: Target
    names: list[str]

    def __post_init__(self) -> None:
        module = llvm.parse_assembly(self.text)
        builder = llvm.JITLibraryBuilder().add_object_img(machine(self.target).emit_object(module))
        for name in self.names:
            builder.export_symbol(name)
        self.compiler = llvm.create_lljit_compiler()
        self.tracker = builder.link(self.compiler, "bench")

    def address(self, name: str) -> int:
        return int(self.tracker[name])

    def function(self, name: str, arguments: int) -> Function:
        return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(self.address(name))


def best(run: Callable[[int], None], turns: int, tries: int = 15) -> float:
    """The shortest time of one turn, among `tries` runs of about 3 ms of processor time."""
    run(turns)
    start = time.thread_time()
    run(turns)
    turns = max(1, int(turns * 3e-3 / (time.thread_time() - start + 1e-9)))
    times = []
    for _ in range(tries):
        start = time.thread_time()
        run(turns)
        times.append((time.thread_time() - start) / turns)
    return min(times)


def aligned(count: int, dtype: np.dtype) -> Array:
    """Small random numbers, on a cache line."""
    store = np.empty(count * dtype.itemsize + 64, np.uint8)
    start = -store.ctypes.data % 64
    out = store[start : start + count * dtype.itemsize].view(dtype)
    out[:] = np.resize(np.random.default_rng(0).integers(-3, 4, 4099), count)
    return out


@dataclass
class Bench:
    target: Target
    dtype: np.dtype

    def __post_init__(self) -> None:
        self.lanes = self.target.lanes(self.dtype)
        self.base = Library(driver() + peak_loop(self.target, self.dtype), self.target, ["drive", "peak"])
        self.drive = self.base.function("drive", 9)
        self.kernels: dict[tuple[int, int], Library] = {}

    def kernel(self, rows: int, vectors: int) -> int:
        if (rows, vectors) not in self.kernels:
            text = emit_micro_kernel("k", self.target, self.dtype, rows, vectors, True)
            self.kernels[rows, vectors] = Library(text, self.target, ["k"])
        return self.kernels[rows, vectors].address("k")

    def peak(self) -> float:
        """Multiply-adds count as two, in GFLOP/s."""
        x = aligned(64 * self.lanes, self.dtype)
        x[:] = 0
        function = self.base.function("peak", 2)
        count = 24 if self.target.vector_registers == 32 else 12
        return 2e-9 * count * self.lanes / best(lambda turns: function(x.ctypes.data, turns), 1000)

    def measure(
        self, tile: tuple[int, int], grid: list[int], a: int, a_row: int, b: int, c: int, c_row: int, loops: list[int]
    ) -> float:
        """GFLOP/s over a grid of tiles: three extents, then three strides (elements) of A, B and C."""
        size = self.dtype.itemsize
        arrays = [aligned(count, self.dtype) for count in (a, b, c)]
        grid_array = np.array(grid[:3] + [size * s for s in grid[3:]], np.int64)
        loops_array = np.array(loops, np.int64)
        at = [array.ctypes.data for array in (*arrays, grid_array, loops_array)]
        kernel = self.kernel(*tile)

        def run(turns: int) -> None:
            self.drive(kernel, at[3], turns, at[0], a_row, at[1], at[2], c_row, at[4])

        work = 2.0 * np.prod(grid[:3]) * np.prod(loops[:3]) * tile[0] * tile[1] * self.lanes
        return float(work / best(run, 1) * 1e-9)

    def matmul(self, tile: tuple[int, int], k: int, spread: bool = False) -> float:
        """About 96 rows and 2 panels; `spread` puts the rows of A a cache line further apart."""
        rows, width = tile[0], tile[1] * self.lanes
        tiles = max(1, 96 // rows)
        row = k + 16 if spread else k
        grid = [2, tiles, 1, 0, rows * row, 0, k * width, 0, 0, width, rows * 2 * width, 0]
        loops = [1, 1, k, 0, 0, 1, 0, 0, width]
        m = tiles * rows
        return self.measure(tile, grid, m * row, row, 2 * k * width, 2 * m * width, 2 * width, loops)

    def convolution(self, tile: tuple[int, int], side: int, channels: int) -> tuple[float, float]:
        """3x3 over side x side pixels: GFLOP/s of the kernel, and the share of it that is used."""
        rows, width = tile[0], tile[1] * self.lanes
        across, panels = -(-side // rows), -(-channels // width)
        line = (across * rows + 2) * channels
        depth = 9 * channels
        grid = [panels, side, across, 0, line, rows * channels, depth * width, 0, 0]
        grid += [width, across * rows * panels * width, rows * panels * width]
        loops = [3, 3, channels, line, channels, 1, 3 * channels * width, channels * width, width]
        pixels = side * across * rows
        sizes = (line * (side + 2), channels, panels * depth * width, pixels * panels * width, panels * width)
        return self.measure(tile, grid, *sizes, loops), side * channels / (across * rows * panels * width)

    def gemv(self, vectors: int) -> tuple[float, float]:
        """One row by 128 MB of packed panels: GB/s, beside plain reading."""
        k, width = 1024, vectors * self.lanes
        panels = (128 << 20) // (k * width * self.dtype.itemsize)
        grid = [panels, 1, 1, 0, 0, 0, k * width, 0, 0, width, 0, 0]
        rate = self.measure(
            (1, vectors), grid, k, k, panels * k * width, panels * width, width, [1, 1, k, 0, 0, 1, 0, 0, width]
        )
        reader = Library(read_loop(self.target), self.target, ["read"])
        function = reader.function("read", 3)
        x, out = aligned((128 << 20) // 4, dtypes.INT32), aligned(256, dtypes.INT32)
        blocks = x.nbytes // (self.target.vector_bits)

        def run(turns: int) -> None:
            for _ in range(turns):
                function(x.ctypes.data, blocks, out.ctypes.data)

        return rate * self.dtype.itemsize / 2, blocks * self.target.vector_bits / best(run, 1) * 1e-9


def compile_times(target: Target, dtype: np.dtype, tile: tuple[int, int]) -> str:
    """Milliseconds to parse, to run passes and to emit, and the size of the text."""
    start = time.thread_time()
    text = emit_micro_kernel("k", target, dtype, *tile, True)
    found = [f"text {len(text) / 1024:.1f} KB in {1e3 * (time.thread_time() - start):.1f} ms"]
    for label, passes, opt in (("no passes, O1", None, 1), ("no passes, O2", None, 2), ("O1", 1, 2), ("O2", 2, 2)):
        times = []
        for _ in range(5):
            where = machine(target, opt)
            start = time.thread_time()
            module = llvm.parse_assembly(text)
            parsed = time.thread_time()
            if passes is not None:
                builder = llvm.create_pass_builder(where, llvm.create_pipeline_tuning_options(passes))
                builder.getModulePassManager().run(module, builder)
            optimised = time.thread_time()
            where.emit_object(module)
            times.append((parsed - start, optimised - parsed, time.thread_time() - optimised))
        parse_ms, pass_ms, emit_ms = 1e3 * np.min(np.array(times), axis=0)
        found.append(f"{label}: {parse_ms:.1f} + {pass_ms:.1f} + {emit_ms:.1f} ms")
    return "; ".join(found)


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--target", default="host", help="a target, as stitch.target reads it")
    reader.add_argument("--dtype", default="float32", choices=[d.name for d in TYPES])
    reader.add_argument("--tiles", default="", help="rows x vectors, separated by commas")
    reader.add_argument("--only", default="matmul,conv,gemv,compile")
    asked = reader.parse_args()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = parse(asked.target)
    if asked.target == "host":
        features = dict(llvm.get_host_cpu_features())
        target = from_host(llvm.get_process_triple(), llvm.get_host_cpu_name(), features)
    dtype = dtypes.parse(asked.dtype)
    if asked.tiles:
        tiles = [(int(r), int(v)) for r, v in (tile.split("x") for tile in asked.tiles.split(","))]
    else:
        tiles = list(main_tiles(target, dtype))
    only = asked.only.split(",")
    bench = Bench(target, dtype)
    print(f"{target}\n{dtype}, {bench.lanes} lanes, peak {bench.peak():.1f} GFLOP/s\n")
    for tile in tiles:
        shape, estimate = f"{tile[0]:3d}x{tile[1]}", efficiency(target, dtype, *tile)
        if "matmul" in only:
            for k in (64, 256, 768, 3072):
                rate, peak = bench.matmul(tile, k), bench.peak()
                print(f"{shape} matmul K={k:<8d} {rate:7.1f} GFLOP/s  peak {rate / peak:5.2f}  estimate {estimate:.2f}")
            rate, peak = bench.matmul(tile, 3072, spread=True), bench.peak()
            print(f"{shape} matmul K=3072+16  {rate:7.1f} GFLOP/s  peak {rate / peak:5.2f}  estimate {estimate:.2f}")
        if "conv" in only:
            for side, channels in ((56, 64), (28, 128), (14, 256), (7, 512)):
                (rate, used), peak = bench.convolution(tile, side, channels), bench.peak()
                name = f"conv {side}²x{channels}"
                print(f"{shape} {name:15s} {rate:7.1f} GFLOP/s  peak {rate / peak:5.2f}  used {used:.2f}")
        if "gemv" in only:
            rate, read = bench.gemv(tile[1])
            print(f"  1x{tile[1]} gemv 128 MB    {rate:7.1f} GB/s     of reading's {read:.1f} GB/s: {rate / read:.2f}")
        if "compile" in only:
            print(f"{shape} compile         {compile_times(target, dtype, tile)}")


if __name__ == "__main__":
    main()
