"""Whole graphs for other instruction sets: run where this machine can, read as assembly where it cannot."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pytest

from stitch import target as targets
from stitch.codegen import assemble, machine
from stitch.runtime import cpu
from stitch.target import Target
from tests import hand_graphs, pipeline

NARROW = ("avx2", "sse2")
ALLOWED = {"stitch_parallel", "stitch_team_size", "memcpy", "memset", "memmove"}


def can_run(target: Target) -> bool:
    here = cpu.host()
    features = {f[1:] for f in target.features if f.startswith("+")}
    return targets.parse("avx2").arch == pipeline.host().arch and all(here.features.get(f, False) for f in features)


@cache
def on_host(name: str) -> list[np.ndarray]:
    return pipeline.run(pipeline.compile(hand_graphs.graph(name)), hand_graphs.feeds(name))


@pytest.mark.parametrize("target", NARROW)
@pytest.mark.parametrize("name", hand_graphs.GRAPHS)
def test_narrower_vectors_give_the_same_results(name: str, target: str) -> None:
    there = targets.parse(target)
    if not can_run(there):
        pytest.skip(f"this machine has no {target}")
    artifact = pipeline.compile(hand_graphs.graph(name), target=there)
    for threads in (1, 2):
        got = pipeline.run(artifact, hand_graphs.feeds(name), threads)
        for a, b in zip(got, on_host(name), strict=True):
            # Sums are cut into other numbers of accumulators: the same terms in another order.
            np.testing.assert_allclose(a, b, rtol=3e-6, atol=1e-5 * float(np.abs(b).max()), strict=True)


@pytest.mark.parametrize("name", ["softmax", "linear_gelu", "two_axes"])
@pytest.mark.parametrize("bits", [128, 256])
def test_a_narrower_vector_than_the_machine_has(name: str, bits: int) -> None:
    from dataclasses import replace

    artifact = pipeline.compile(hand_graphs.graph(name), target=replace(pipeline.host(), vector_bits=bits))
    for a, b in zip(pipeline.run(artifact, hand_graphs.feeds(name)), on_host(name), strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-6, atol=1e-5 * float(np.abs(b).max()), strict=True)


def assembly(name: str, target: Target) -> tuple[str, bytes]:
    texts: list[str] = []

    def compile(text: str) -> bytes:
        texts.append(machine.assembly(text, target))
        return machine.compile(text, target)

    artifact = assemble.assemble(pipeline.cut(hand_graphs.graph(name)), target, compile, {})
    return texts[0], artifact.code


@pytest.mark.parametrize("name", ["transformer_block", "small_cnn"])
def test_neon(name: str) -> None:
    text, code = assembly(name, targets.parse("neon"))
    assert code[:4] == b"\x7fELF"
    assert code[18:20] == (183).to_bytes(2, "little"), "not an object for aarch64"
    assert re.search(r"\bfmla\s+v\d+\.4s", text), "no vector multiply-add"
    called = set(re.findall(r"^\s+bl?\s+([A-Za-z_]\w*)\s*$", text, re.M))
    outside = {c for c in called if f"\n{c}:" not in text and not c.startswith((".L", "contract"))}
    assert outside <= ALLOWED, f"calls of {sorted(outside - ALLOWED)}"


@pytest.mark.parametrize("target", ["avx512", "avx2", "sse2"])
@pytest.mark.parametrize("name", ["transformer_block", "small_cnn"])
def test_x86(name: str, target: str) -> None:
    text, _ = assembly(name, targets.parse(target))
    register = {"avx512": "zmm", "avx2": "ymm", "sse2": "xmm"}[target]
    assert f"%{register}" in text or re.search(rf"\b{register}\d", text)
    if target != "sse2":
        assert "vfmadd" in text
    called = set(re.findall(r"^\s+(?:call|jmp)q?\s+([A-Za-z_]\w*)(?:@PLT)?\s*$", text, re.M))
    outside = {c for c in called if f"\n{c}:" not in text}
    assert outside <= ALLOWED, f"calls of {sorted(outside - ALLOWED)}"
