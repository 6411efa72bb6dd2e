"""The cost model: what is counted, which bytes come from where, the fit, and what is kept."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stitch import calibration, compiler, cost, dims, dtypes, fitting, measure
from stitch import target as targets
from stitch.calibration import command, networks
from stitch.codegen import assemble
from stitch.cost import Rates, Work
from stitch.errors import ResourceError
from stitch.graph import Builder, Graph
from stitch.measure import Sample
from tests import hand_graphs

AVX512 = targets.NAMES["avx512"]
AVX2 = targets.NAMES["avx2"]
F32 = dtypes.FLOAT32


def works(graph: Graph, sizes: dict[str, int], target: targets.Target = AVX512) -> list[Work]:
    stitched = compiler.cut(graph, target)
    lowered = assemble.lower(stitched, target)
    return [w for phases in measure.works(stitched, lowered, sizes, target, reused=True) for w in phases]


def elementwise(n: int, m: int) -> Graph:
    b = Builder()
    return b.finish({"y": b.add(b.mul(b.input("x", F32, (n, m)), 2.0), 1.0)})


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def product(m: int, k: int, n: int) -> Graph:
    b = Builder()
    x = b.input("x", F32, (m, k))
    return b.finish({"y": b.contract(x, b.const(weights(k, n)), [0, 1], [1, 2], [0, 2])})


@pytest.mark.parametrize("target", [AVX512, AVX2], ids=["avx512", "avx2"])
def test_counts_of_elementwise_work(target: targets.Target) -> None:
    (work,) = works(elementwise(64, 1024), {}, target)
    vectors = 64 * 1024 * 32 / target.vector_bits
    assert (work.loads, work.stores) == (vectors, vectors)
    assert work.simple == vectors, "a multiply-add is one instruction"
    assert work.fused == work.dear == work.gathers == 0


def test_counts_of_a_product() -> None:
    (work,) = works(product(56, 128, 64), {})
    assert work.fused == pytest.approx(56 * 128 * 64 / 16), "one vector a cycle, rows that do not exist excluded"


def test_invariants_count_outside_the_loop() -> None:
    """A row's sum is divided once, by scalar code, however long the row."""
    b = Builder()
    x = b.input("x", F32, (8, 4096))
    y = b.mul(x, b.unary("rsqrt", b.reduce("reduce_sum", b.mul(x, x), [1], True)))
    total = works(b.finish({"y": y}), {})
    assert sum(w.dear for w in total) == 0
    assert 0 < sum(w.scalars for w in total) < 8 * 100


def test_sizes_are_numbers_put_in_for_symbols() -> None:
    graph = hand_graphs.graph("layer_norm_gelu")
    small, large = works(graph, {"n": 32}), works(graph, {"n": 3200})
    assert sum(w.dear for w in large) == pytest.approx(100 * sum(w.dear for w in small), rel=0.02)


def test_bytes_come_from_the_cache_that_holds_them() -> None:
    fits = works(elementwise(16, 1024), {})[0]  # 128 KB in and out, which stay in the second cache
    assert fits.memory == 0
    assert fits.near > 0
    (large,) = works(elementwise(8192, 4096), {})  # 256 MB: more than any cache
    total = 2 * 8192 * 4096 * 4
    assert total - AVX512.l3_bytes <= large.memory <= 1.01 * total, "all but what the last run may have left"


def test_panels_come_once_for_each_block_of_columns() -> None:
    """Weights of 64 MB are read once, and not once for each row."""
    (work,) = works(product(64, 4096, 4096), {})
    once = 4096 * 4096 * 4
    assert once - AVX512.l3_bytes <= work.memory <= 1.2 * once


def test_what_a_kernel_leaves_is_near_the_next() -> None:
    b = Builder()
    x = b.input("x", F32, (64, 512))
    first = b.contract(x, b.const(weights(512, 512)), [0, 1], [1, 2], [0, 2])
    y = b.contract(first, b.const(weights(512, 512)), [0, 1], [1, 2], [0, 2])
    found = works(b.finish({"y": y}), {})
    assert all(w.memory == 0 for w in found), "two megabytes of weights are in the third cache from the last run"


def test_a_result_in_the_place_of_an_operand_is_touched_once() -> None:
    """relu(x w) w': the relu of a kernel of its own writes where it reads."""
    b = Builder()
    x = b.input("x", F32, (256, 1024))
    first = b.contract(x, b.const(weights(1024, 1024)), [0, 1], [1, 2], [0, 2])
    rows = b.mul(first, b.unary("rsqrt", b.reduce("reduce_sum", b.mul(first, first), [1], True)))
    y = b.contract(rows, b.const(weights(1024, 1024)), [0, 1], [1, 2], [0, 2])
    found = [w for w in works(b.finish({"y": y}), {}) if not w.fused]
    assert sum(w.touched for w in found) == pytest.approx(256 * 1024 * 4, rel=0.1)


def test_what_comes_in_short_pieces_is_loose() -> None:
    b = Builder()
    x = b.input("x", F32, (8192, 4096))
    (work,) = works(b.finish({"y": b.transpose(b.mul(x, 2.0), (1, 0))}), {})
    assert work.memory_loose > 0.9 * work.memory
    (work,) = works(elementwise(8192, 4096), {})
    assert work.memory_loose < 0.5 * work.memory


def away(graph: Graph, size: float) -> list[Work]:
    """The work if others touch so many bytes between two runs."""
    stitched = compiler.cut(graph, AVX512)
    lowered = assemble.lower(stitched, AVX512)
    return [w for phases in measure.works(stitched, lowered, {}, AVX512, reused=True, away=size) for w in phases]


def test_parts_of_a_result_are_touched_each() -> None:
    """concat([x[:, 128:384], x], 1): each is written to columns of its own."""
    b = Builder()
    x = b.input("x", F32, (500, 384))
    found = away(b.finish({"y": b.concat([b.slice(x, [0, 128], [500, 256]), x], 1)}), 1e9)
    assert sum(w.memory for w in found) == pytest.approx((2 * 384 + 256) * 500 * 4, rel=0.2)


def test_what_others_touch_between_runs_is_in_the_way() -> None:
    found = [away(elementwise(64, 1024), size)[0].memory for size in (0, 1e6, 1e9)]
    assert found == [0, 0, 2 * 64 * 1024 * 4]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(hand_graphs.GRAPHS)), st.integers(1, 300), st.sampled_from([AVX512, AVX2]))
def test_descriptors_of_any_graph_are_sane(name: str, n: int, target: targets.Target) -> None:
    for w in works(hand_graphs.graph(name), {"n": n, "s": 7}, target):
        numbers = [getattr(w, f) for f in (*Work.COUNTS, *Work.BYTES, "tasks", "touched")]
        assert all(math.isfinite(x) and x >= 0 for x in numbers), w


# -------------------------------------------------- rates


def some_work(**given: float) -> Work:
    return replace(Work(64, 1, 1e6, 1e5, 1e5, 1e5, 1e5, simple=1e5, loads=1e4), **given)


@given(st.sampled_from([*Work.COUNTS, *Work.BYTES]), st.floats(1, 1e9), st.integers(1, 4))
def test_more_work_takes_no_less_time(name: str, more: float, threads: int) -> None:
    rates, work = Rates.of(AVX512), some_work()
    heavier = replace(work, **{name: getattr(work, name) + more})
    assert rates.seconds(heavier, threads) >= rates.seconds(work, threads)


def test_a_team_divides_what_is_in_chunks() -> None:
    rates = Rates.of(AVX512)
    heavy = some_work(simple=1e8)
    assert rates.seconds(heavy) / rates.seconds(heavy, 2) == pytest.approx(2, rel=0.01)
    assert rates.seconds(replace(heavy, tasks=1), 2) == rates.seconds(replace(heavy, tasks=1))
    odd = replace(heavy, tasks=3)
    assert rates.seconds(odd) / rates.seconds(odd, 2) == pytest.approx(1.5, rel=0.01)


def test_rates_are_checked() -> None:
    rates = Rates.of(AVX2)
    with pytest.raises(ValueError, match="not negative"):
        replace(rates, dispatch=-1.0)
    with pytest.raises(ValueError, match="counts"):
        replace(rates, counts=(1.0,))


def test_rates_are_told() -> None:
    """One line for each number, whether they are guessed or fitted."""
    text = command.describe(Rates.of(AVX512), AVX512)
    assert len(text.splitlines()) == 1 + len(Work.COUNTS) + len(Work.BYTES) + 2


def test_rates_are_kept(tmp_path: Path) -> None:
    rates, path = replace(Rates.of(AVX512), fitted=True), tmp_path / "a" / "rates.json"
    assert cost.load(path, AVX512) is None
    cost.save(rates, AVX512, path)
    assert cost.load(path, AVX512) == rates
    assert cost.load(path, AVX2) is None, "of another machine"
    path.write_text(path.read_text().replace("fused", "fuse"))
    assert cost.load(path, AVX512) is None, "of a version that counts other things"
    path.write_text("{")
    with pytest.raises(ResourceError, match=r"no calibration.*calibrate"):
        cost.load(path, AVX512)


# -------------------------------------------------- the fit


@given(st.integers(0, 10**6))
def test_nonnegative_least_squares(seed: int) -> None:
    """No step along a coefficient that may be taken makes it better (the conditions of Karush, Kuhn and Tucker)."""
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((12, 5)) * 10.0 ** random.integers(-6, 6, 5), random.standard_normal(12)
    x = fitting.nonnegative(a, b)
    assert (x >= 0).all()
    slope = a.T @ (a @ x - b) / (np.linalg.norm(a, axis=0) * np.linalg.norm(b))
    assert (slope > -1e-8).all()
    assert (np.abs(slope[x > 0]) < 1e-8).all()


def test_the_fit_finds_rates_that_made_the_times() -> None:
    random = np.random.default_rng(1)
    truth = replace(Rates.of(AVX512), wake=0.0, shared=1.0)
    samples = []
    for _ in range(400):
        numbers = {name: 10 ** random.uniform(2, 7) * random.integers(0, 2) for name in Work.COUNTS}
        moved = {name: 10 ** random.uniform(2, 9) for name in Work.BYTES}
        work = Work(tasks=1, grain=1, touched=0, **moved, **numbers)
        samples.append(Sample(None, 0, work, truth.seconds(work)))  # type: ignore[arg-type]
    found = calibration.fit(samples)
    errors = [abs(found.seconds(s.work) / s.seconds - 1) for s in samples]
    assert max(errors) < 0.02


def test_networks_of_the_calibration_are_well_formed() -> None:
    names = [n.name for n in networks.all_networks()]
    assert len(set(names)) == len(names)
    for network in networks.all_networks():
        network.graph.check()
        assert all(len(shape) == network.graph.inputs[0].rank for shape in network.shapes)


def test_a_small_network_is_sampled() -> None:
    b = Builder("small")
    graph = b.finish({"y": b.unary("exp", b.input("x", F32, (dims.symbol("n"), 4096)))})
    network = networks.Network("small", graph, ((32, 4096), (64, 4096)))
    from stitch.codegen import machine

    found = calibration.samples(network, machine.host())
    assert len(found) == 2
    assert all(s.seconds > 0 and s.work.dear > 0 for s in found)
