"""A stitched model in parts gives the bits of the whole, wherever it is cut, and says beforehand where it cannot be."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stitch import dims, dtypes, partition, plan
from stitch.bundle import Given, Made, Sizes, joined, wires
from stitch.errors import ConstraintViolated, SymbolConflict, WrongDtype
from stitch.graph import Builder, Graph
from stitch.knobs import Scheme
from stitch.ops.primitives import Array
from stitch.partition import Partition
from stitch.runtime.cache import Cache
from stitch.runtime.pipeline import load
from stitch.stitching.stitch import ALL
from tests import pipeline as compiler
from tests.graphs import Case, graphs


def run(parts: Partition, feeds: dict[str, Array]) -> list[Array]:
    bundle = parts.bundle(compiler.build, {})
    with load(bundle, [None] * len(bundle.parts)) as made:
        return made.run([feeds[p.name] for p in bundle.inputs])


def agree(graph: Graph, feeds: dict[str, Array], positions: list[int], schemes: Collection[Scheme] = ALL) -> Partition:
    stitched = compiler.cut(graph, schemes)
    parts = partition.cut(stitched, positions)
    for part in parts.parts:
        part.stitched.check()
    whole = compiler.run(compiler.build(stitched), feeds)
    assert compiler.same_bits(run(parts, feeds), whole)
    return parts


@settings(max_examples=60)
@given(graphs(), st.data())
def test_exact_graphs_at_any_cuts(case: Case, data: st.DataObject) -> None:
    schemes = data.draw(st.sampled_from(compiler.SCHEMES))
    possible = partition.borders(compiler.cut(case.graph, schemes))
    cuts = data.draw(st.sets(st.sampled_from(possible))) if possible else set()
    agree(case.graph, case.feeds, sorted(cuts), schemes)


@settings(max_examples=40)
@given(graphs(exact=False), st.data())
def test_sums_and_contractions_at_any_cuts(case: Case, data: st.DataObject) -> None:
    schemes = data.draw(st.sampled_from(compiler.SCHEMES))
    possible = partition.borders(compiler.cut(case.graph, schemes))
    cuts = data.draw(st.sets(st.sampled_from(possible))) if possible else set()
    agree(case.graph, case.feeds, sorted(cuts), schemes)


@settings(max_examples=40)
@given(graphs(exact=False), st.data())
def test_kernels_in_any_possible_parts(case: Case, data: st.DataObject) -> None:
    """Each kernel in a part from the latest one on that it reads from."""
    stitched = compiler.cut(case.graph, data.draw(st.sampled_from(compiler.SCHEMES)))
    home: dict[object, int] = {}
    assignment: list[int] = []
    for kernel in stitched.kernels:
        least = max([home[v] for v in kernel.reads() if v in home], default=0)
        pieces = [home[v] for v in kernel.writes() if v in home]
        part = pieces[0] if pieces else data.draw(st.integers(least, max([least, *assignment]) + 1))
        home.update((v, part) for v in kernel.writes())
        assignment.append(part)
    used = sorted(set(assignment))
    assignment = [used.index(p) for p in assignment]
    try:
        parts = partition.split(stitched, assignment)
    except ValueError:  # a piece of a value in a part before what it reads
        assert any(
            home[v] > p for k, p in zip(stitched.kernels, assignment, strict=True) for v in k.reads() if v in home
        )
        return
    assert compiler.same_bits(run(parts, case.feeds), compiler.run(compiler.build(stitched), case.feeds))


# ------------------------------------------------------------------ symbols and conditions


def chain() -> Graph:
    """Sums of rows, whose shape tells nothing of the columns that the second kernel needs."""
    b = Builder("chain")
    n, m = dims.symbol("n"), dims.symbol("m")
    x, w = b.input("x", dtypes.FLOAT32, (n, m)), b.input("w", dtypes.FLOAT32, (m, 4))
    total = b.reduce("reduce_sum", b.contract(x, w, (0, 1), (1, 2), (0, 2)), [0, 1])
    spread = b.broadcast(b.reshape(total, (1, 1)), (n, m))
    return b.finish({"y": b.contract(spread, b.unary("exp", b.transpose(spread, (1, 0))), (0, 1), (1, 2), (0, 2))})


def feeds_of_chain(n: int = 3, m: int = 5) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {"x": rng.random((n, m), np.float32) / 9, "w": rng.random((m, 4), np.float32) / 9}


def test_symbols_that_no_value_shows_come_as_a_shape() -> None:
    stitched = compiler.cut(chain())
    seen = False
    for k in partition.borders(stitched):
        parts = agree(chain(), feeds_of_chain(), [k])
        extra = [s for s in parts.parts[1].sources if isinstance(s, Sizes)]
        seen |= bool(extra)
        assert all(set(s.axes) <= {(0, 0), (0, 1)} for s in extra)
    assert seen


def test_the_first_part_has_all_inputs_and_conditions() -> None:
    b = Builder("late")
    n, m = dims.symbol("n"), dims.symbol("m")
    x, y = b.input("x", dtypes.FLOAT32, (n, 8)), b.input("y", dtypes.FLOAT32, (m, 8))
    first = b.contract(x, b.const(np.eye(8, dtype=np.float32)), (0, 1), (1, 2), (0, 2))
    b.unify(n * 2, m * m, "a test")
    z = b.input("z", dtypes.FLOAT32, (n, 8))
    second = b.contract(first, b.concat([y, z], 0), (0, 1), (2, 1), (0, 2))
    stitched = compiler.cut(b.finish({"r": second}))
    bundle = partition.cut(stitched, partition.borders(stitched)[-1:]).bundle(compiler.build, {})
    assert len(bundle.parts[0].inputs) == 3
    ones = np.ones((2, 8), np.float32)
    with load(bundle, [None] * len(bundle.parts)) as made:
        made.run([ones, ones, ones])
        ran: list[int] = []
        late = made.stages[1]
        object.__setattr__(late, "run", lambda *_: ran.append(1))
        with pytest.raises(SymbolConflict):
            made.run([ones, ones, np.ones((3, 8), np.float32)])
        with pytest.raises(ConstraintViolated, match="a test"):
            made.run([ones, np.ones((3, 8), np.float32), ones])
        with pytest.raises(WrongDtype):
            made.run([ones, ones, np.ones((2, 8))])
        assert not ran


def test_what_only_a_host_step_knows() -> None:
    b = Builder("found")
    x = b.input("x", dtypes.FLOAT32, (dims.symbol("n"),))
    k = b.fresh("found")
    (places,) = b.host("nonzero", [b.lt(x, 0.0)], [(dtypes.INT64, (1, k))])
    picked = b.gather(x, [b.reshape(places, (k,))], [0])
    total = b.reduce("reduce_sum", picked, [0])
    spread = b.broadcast(b.reshape(total, (1,)), (k,))  # its size is found, and it reads nothing of that size
    y = b.contract(spread, picked, (0,), (0,), ())
    graph = b.finish({"y": y, "z": b.cumulate(picked) if hasattr(b, "cumulate") else b.unary("exp", spread)})
    stitched = compiler.cut(graph)
    x_ = np.array([1, -2, 3, -4, -5], np.float32)
    for cut in partition.borders(stitched):
        agree(graph, {"x": x_}, [cut])
    agree(graph, {"x": x_}, list(partition.borders(stitched)))
    agree(graph, {"x": -np.abs(x_)}, list(partition.borders(stitched)))


# ------------------------------------------------------------------ cuts that are none


def test_pieces_of_a_value_stay_together() -> None:
    b = Builder("pieces")
    x = b.input("x", dtypes.FLOAT32, (4, 8))
    parts = [b.reduce("reduce_max", b.unary("exp", v), [1], True) for v in (x, b.unary("abs", x), b.unary("tanh", x))]
    stitched = compiler.cut(b.finish({"y": b.concat(parts, 1)}), compiler.SCHEMES[0])
    writers = [i for i, k in enumerate(stitched.kernels) if any(r.is_piece for g in k.groups for r in g.roots)]
    assert len(writers) > 1, "the concat is not written in pieces by several kernels"
    inside = range(writers[0] + 1, writers[-1] + 1)
    assert not set(inside) & set(partition.borders(stitched))
    with pytest.raises(ValueError, match="possible are"):
        partition.cut(stitched, [inside[0]])
    with pytest.raises(ValueError, match="piece"):
        partition.split(stitched, [int(i >= inside[0]) for i in range(len(stitched.kernels))])


def test_wrong_assignments() -> None:
    stitched = compiler.cut(chain())
    n = len(stitched.kernels)
    assert n > 1
    for wrong in ([0] * (n - 1), [1] * n, [2, *[0] * (n - 1)]):
        with pytest.raises(ValueError, match="cannot be split"):
            partition.split(stitched, wrong)
    with pytest.raises(ValueError, match="a later part writes"):
        partition.split(stitched, [1, *[0] * (n - 1)])
    for cuts in ([0], [n], [1, 1]):
        with pytest.raises(ValueError, match="possible are"):
            partition.cut(stitched, cuts)


# ------------------------------------------------------------------ what the parts hold


def test_weights_are_in_the_parts_that_read_them() -> None:
    b = Builder("two")
    x = b.input("x", dtypes.FLOAT32, (4, 512))
    rng = np.random.default_rng(0)
    for _ in range(2):
        x = b.contract(x, b.const(rng.random((512, 512), np.float32)), (0, 1), (1, 2), (0, 2))
        x = b.unary("exp", b.mul(x, 1e-3))
    stitched = compiler.cut(b.finish({"y": x}))
    whole = memoryview(compiler.build(stitched).constants).nbytes
    bundle = partition.cut(stitched, [1]).bundle(compiler.build, {})
    sizes = [memoryview(part.constants).nbytes for part in bundle.parts]
    assert sum(sizes) <= whole + 4096
    assert max(sizes) <= whole // 2 + 4096


def test_bundles_are_kept_on_disk(tmp_path: Path) -> None:
    stitched = compiler.cut(chain())
    parts = partition.cut(stitched, partition.borders(stitched)[:1])
    bundle = parts.bundle(compiler.build, {"external": [["file", 1, 2]]})
    cache = Cache(tmp_path / "cache", 1 << 30)
    assert cache.load_bundle("key") is None
    assert cache.store_bundle("key", bundle)
    found = cache.load_bundle("key")
    assert found is not None
    assert (found.sources, found.results, found.inputs) == (bundle.sources, bundle.results, bundle.inputs)
    feeds = feeds_of_chain()
    with load(found, [None] * len(found.parts)) as made:
        got = made.run([feeds[p.name] for p in found.inputs])
    assert compiler.same_bits(got, run(parts, feeds))
    next((tmp_path / "cache").glob("*.artifact")).unlink()
    assert cache.load_bundle("key") is None
    assert cache.store_bundle("key", bundle)
    assert cache.load_bundle("key") is not None


def test_wires_that_do_not_fit() -> None:
    stitched = compiler.cut(chain())
    bundle = partition.cut(stitched, []).bundle(compiler.build, {})
    assert bundle.sources == ((Given(0), Given(1)),)
    assert bundle.results == (Made(0, 0),)
    text = wires(bundle)
    assert joined(text, bundle.parts).sources == bundle.sources
    for old, new in (('"given", 1', '"given", 2'), ('"given", 0', '"made", 0, 0'), ('"given"', '"taken"')):
        with pytest.raises(ValueError, match="not a"):
            joined(text.replace(old, new), bundle.parts)
    with pytest.raises(ValueError, match="not a bundle"):
        joined(text, [])
    assert isinstance(bundle.parts[0], plan.Artifact)
