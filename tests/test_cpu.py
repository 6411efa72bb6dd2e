"""Loading machine code, and what the runtime's own code believes about arrays; scratch memory; devices."""

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stitch import knobs
from stitch.errors import ResourceError
from stitch.plan import Artifact, Port
from stitch.runtime import cpu
from stitch.runtime.device import Device, Null
from stitch.runtime.executable import Processor
from stitch.runtime.memory import ALIGNMENT, HUGE, Arena, Pool, address_of, aligned_copy

IR = """
declare float @expf(float)
declare i64 @given(i64)
@table = private constant [3 x float] [float 0.0, float 1.0, float 2.0]

define float @exponential(i64 %i) {
  %at = getelementptr [3 x float], ptr @table, i64 0, i64 %i
  %x = load float, ptr %at
  %y = call float @expf(float %x)
  ret float %y
}

define i64 @twice(i64 %x) {
  %y = call i64 @given(i64 %x)
  %z = call i64 @given(i64 %y)
  ret i64 %z
}
"""


def test_host() -> None:
    host = cpu.host()
    assert host.triple
    assert host.cpu
    assert all(isinstance(name, str) and isinstance(has, bool) for name, has in host.features.items())


def test_library() -> None:
    signature = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
    given = signature(lambda x: 3 * x)
    imports = {"given": ctypes.cast(given, ctypes.c_void_p).value or 0}
    library = cpu.Library(cpu.compile_ir(IR), ["exponential", "twice"], imports)
    exponential = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_int64)(library["exponential"])
    assert exponential(2) == pytest.approx(np.exp(2), rel=1e-6)
    assert signature(library["twice"])(5) == 45
    library.close()


@pytest.mark.parametrize("damage", ["garbage", "half", "name", "import"])
def test_code_that_cannot_be_loaded(damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    code = cpu.compile_ir(IR)
    given = {"garbage": b"no object", "half": code[: len(code) // 2]}.get(damage, code)
    imports = {} if damage == "import" else {"given": 1}
    with pytest.raises(ResourceError, match="could not be loaded"):
        cpu.Library(given, ["twice", "missing"] if damage == "name" else ["twice"], imports)
    assert capfd.readouterr() == ("", "")


def test_support_is_kept_on_disk(tmp_path: Path) -> None:
    with knobs.using(cache_dir=tmp_path / "cache"):
        code = cpu._support_code()
        (file,) = (tmp_path / "cache").iterdir()
        assert file.read_bytes().endswith(code)
        assert cpu._support_code() == code
        file.write_bytes(b"damaged")
        assert cpu.Library(cpu._support_code(), ["stitch_run"])["stitch_run"]


def test_teams_are_shared() -> None:
    assert cpu.team(1) is None
    assert cpu.team(2) is cpu.team(2)
    assert cpu.team(2) is not cpu.team(3)


def test_arrays_are_read_natively() -> None:
    assert cpu.reads_arrays()


def test_nothing_of_the_compiler_is_imported() -> None:
    program = """
import sys
from stitch.runtime import executable
print(sorted({"onnx", "sympy", "stitch.graph", "stitch.dims", "stitch.codegen"} & set(sys.modules)))
"""
    root = Path(__file__).resolve().parent.parent
    found = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert (found.stdout, found.stderr) == ("[]\n", "")


def test_arena() -> None:
    arena = Arena()
    assert arena.reserve(0) == 0
    small = arena.reserve(100)
    assert small % ALIGNMENT == 0
    assert arena.reserve(50) == small
    large = arena.reserve(3 * HUGE)
    assert large % HUGE == 0
    ctypes.memset(large, 7, 3 * HUGE)
    assert arena.reserve(3 * HUGE) == large
    with pytest.raises(ResourceError, match="no memory"):
        arena.reserve(1 << 62)
    assert arena.reserve(10)


def test_pool() -> None:
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    pool = Pool(make)
    first, second = pool.take(), pool.take()
    pool.give(second)
    pool.give(first)
    assert {pool.take(), pool.take()} == {0, 1}
    assert made == [0, 1]


def test_aligned_copy() -> None:
    data = np.zeros(256, np.uint8)
    start = -address_of(data) % 64
    aligned, odd = data[start : start + 100], data[start + 1 : start + 101]
    odd[:] = np.arange(100)
    assert address_of(aligned_copy(aligned)) == address_of(aligned)
    copy = aligned_copy(odd)
    assert address_of(copy) % 64 == 0
    assert copy.tolist() == list(range(100))
    assert aligned_copy(b"").size == 0


def test_null_device() -> None:
    artifact = Artifact(
        target="null",
        symbols=("n",),
        inputs=(Port("x", "float32", ("n", 3)),),
        outputs=(Port("y", "int64", (2, "n")),),
        slots=(),
        bindings=((0, 0, 0),),
        steps=(),
    )
    device: Device = Null()
    run = device.load(artifact)
    (y,) = run([np.ones((4, 3), np.float32)], None)
    assert (y.shape, y.dtype) == ((2, 4), np.dtype(np.int64))
    assert not y.any()
    own = np.ones((2, 4), np.int64)
    assert run([np.ones((4, 3), np.float32)], [own])[0] is own
    assert not own.any()
    assert device.transfer(y, "host", "host") is y
    other: Device = Processor()
    assert other.spaces == ("host",)
