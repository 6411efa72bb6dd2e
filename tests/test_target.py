"""Targets: their text, what follows from features, and what is read from the machine."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stitch.target import NAMES, Caches, Target, count_cores, cpu_quota, detect, from_host, parse, read_caches

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


@pytest.mark.parametrize("name", [*NAMES, "host"])
def test_text_round_trips(name: str) -> None:
    target = parse(name)
    assert parse(str(target)) == target
    assert parse(f"{name};cores=7;l3=0") == replace(target, cores=7, l3_bytes=0)


def test_text_is_stable() -> None:
    text = "x86_64-unknown-linux-gnu/x86-64/128/+sse2;cores=1;l1=32768;l2=1048576;l3=16777216"
    assert str(parse("sse2")) == text
    assert parse("riscv64-unknown-linux-gnu/generic-rv64").vector_bits == 128


@pytest.mark.parametrize(
    ("name", "lanes", "registers", "fma", "masked", "f16c"),
    [
        ("sse2", 4, 16, False, False, False),
        ("avx2", 8, 16, True, True, True),
        ("avx512", 16, 32, True, True, True),
        ("neon", 4, 32, True, False, True),
    ],
)
def test_what_follows_from_features(name: str, lanes: int, registers: int, fma: bool, masked: bool, f16c: bool) -> None:
    target = parse(name)
    assert (target.lanes(FLOAT32), target.lanes(FLOAT64)) == (lanes, lanes // 2)
    assert (target.vector_registers, target.fma, target.masked, target.f16c) == (registers, fma, masked, f16c)


def test_narrow_vectors_of_a_wide_machine_keep_its_registers() -> None:
    target = replace(parse("avx512"), vector_bits=256)
    assert (target.lanes(FLOAT32), target.vector_registers, target.masked) == (8, 32, True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("avx3", "there is no target 'avx3'; use sse2, avx2, avx512, neon, host, or"),
        ("", "there is no target ''"),
        ("avx2;threads=2", "'threads=2' is not a setting of a target; there are cores, l1, l2, l3"),
        ("avx2;cores=many", "'many' in 'cores=many' is not a whole number"),
        ("avx2;cores=0", "at least one core"),
        ("x86_64-a-b-c/znver4/300", "vectors of 300 bits are not supported; there are 128, 256, 512"),
        ("x86_64-a-b-c/znver4/512/+avx2", r"need avx2 \(256\) or avx512f, avx512vl \(512\)"),
        ("x86_64-a-b-c/znver4/128/avx2", "'avx2' is not a feature; write [+]name or -name"),
        ("x86_64-a-b-c/znver4/128//", "too many parts"),
        ("/znver4", "must be a triple and a cpu"),
    ],
)
def test_errors_say_what_there_is(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(text)


def test_from_host_keeps_what_matters_in_a_fixed_order() -> None:
    features = {"mmx": True, "avx2": True, "avx": True, "fma": True, "avx512f": False, "rtm": False}
    target = from_host("x86_64-unknown-linux-gnu", "haswell", features, 3, Caches(1, 2, 3))
    assert target == Target(
        "x86_64-unknown-linux-gnu", "haswell", ("+avx", "+avx2", "+fma", "-avx512f"), 256, 3, 1, 2, 3
    )
    assert from_host("aarch64-apple-darwin", "apple-m1", {"neon": True}, 8, Caches()).vector_bits == 128


def test_detect_reads_cpuinfo(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor: 0\n")
    assert detect(cpuinfo).vector_bits == 128
    assert detect(tmp_path / "missing").cpu in ("x86-64", "generic")
    if parse("host").is_x86:
        cpuinfo.write_text("flags\t: sse2 pni ssse3 sse4_1 sse4_2 popcnt avx avx2 fma f16c bmi1 bmi2 abm movbe\n")
        assert (detect(cpuinfo).cpu, detect(cpuinfo).vector_bits) == ("x86-64-v3", 256)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_quota_of_version_2_is_the_smallest_above(tmp_path: Path) -> None:
    write(tmp_path / "self", "0::/pod/box\n")
    write(tmp_path / "groups/pod/box/cpu.max", "max 100000\n")
    write(tmp_path / "groups/pod/cpu.max", "150000 100000\n")
    assert cpu_quota(tmp_path / "groups", tmp_path / "self") == 1.5
    assert count_cores(tmp_path / "groups", tmp_path / "self") <= 2


@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct"])
def test_quota_of_version_1(tmp_path: Path, controllers: str) -> None:
    write(tmp_path / "self", f"7:blkio:/\n3:{controllers}:/docker/of-the-host\n")
    write(tmp_path / "groups" / controllers / "cpu.cfs_quota_us", "50000\n")
    write(tmp_path / "groups" / controllers / "cpu.cfs_period_us", "100000\n")
    assert cpu_quota(tmp_path / "groups", tmp_path / "self") == 0.5
    assert count_cores(tmp_path / "groups", tmp_path / "self") == 1


@pytest.mark.parametrize(
    ("path", "controllers", "folder"),
    [
        ("/docker/x/inner", "cpu,cpuacct", "cpu,cpuacct/inner"),  # the mount shows what is below /docker/x
        ("/../y", "cpu", "cpu/y"),
        ("/box", "cpuacct,cpu", "cpu,cpuacct/box"),
    ],
)
def test_quota_of_a_group_that_goes_by_another_path(tmp_path: Path, path: str, controllers: str, folder: str) -> None:
    write(tmp_path / "self", f"3:{controllers}:{path}\n")
    write(tmp_path / "groups" / folder / "cpu.cfs_quota_us", "50000\n")
    write(tmp_path / "groups" / folder / "cpu.cfs_period_us", "100000\n")
    assert cpu_quota(tmp_path / "groups", tmp_path / "self") == 0.5


def test_no_quota(tmp_path: Path) -> None:
    write(tmp_path / "self", "3:cpu:/\n0::/\n")
    write(tmp_path / "groups/cpu/cpu.cfs_quota_us", "-1\n")
    assert cpu_quota(tmp_path / "groups", tmp_path / "self") == math.inf
    assert cpu_quota(tmp_path / "groups", tmp_path / "missing") == math.inf
    assert count_cores(tmp_path / "groups", tmp_path / "missing") >= 1


def test_caches(tmp_path: Path) -> None:
    sizes = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2M")]
    for index, values in enumerate(sizes):
        for name, value in zip(("level", "type", "size"), values, strict=True):
            write(tmp_path / f"index{index}" / name, value + "\n")
    assert read_caches(tmp_path) == Caches(48 << 10, 2 << 20, 0)
    assert read_caches(tmp_path / "missing") == Caches()
