"""What the stitcher decides: clusters without cycles, kernels, phases, and where values live."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stitch import dims, dtypes
from stitch import target as targets
from stitch.codegen import interp, kernels
from stitch.evaluate import evaluate
from stitch.graph import Builder, Value
from stitch.knobs import Scheme
from stitch.simplify import simplify
from stitch.stitching import clusters, dominants
from stitch.stitching.schedule import Group, Kernel, Placement, Stitched
from stitch.stitching.stitch import materialise
from stitch.stitching.trace import Blocked, Flow
from tests import hand_graphs, pipeline
from tests.graphs import Case, graphs

N = dims.symbol("n")


def merged_by_starting_over(groups: Sequence[Group]) -> list[Group]:
    """`dominants.merge` as it is meant: the first two that go together become one, until there are no such two."""
    current = list(groups)
    folded = {r.value for g in current for r in g.roots if r.fold}
    pairs = [(j, k) for k in range(len(current)) for j in range(k)]
    while pairs:
        j, k = pairs.pop(0)
        one = dominants._join(current, j, k, folded, dominants._users(current))
        if one is not None:
            current = dominants.sort([*current[:j], one, *current[j + 1 : k], *current[k + 1 :]])
            pairs = [(j, k) for k in range(len(current)) for j in range(k)]
    return current


@settings(max_examples=60)
@given(graphs(exact=False))
def test_merging_is_the_same_as_by_starting_over(case: Case) -> None:
    graph = materialise(simplify(case.graph))
    stops = {v for n in graph.nodes if n.prim in ("scatter", "host", "contract") for v in n.inputs} | set(graph.outputs)
    flow = Flow(graph, stops)
    members = [n for n in graph.nodes if flow.is_computed(n) and n.prim not in ("scatter", "host", "contract")]
    made = {n.output for n in members}
    try:
        found = dominants.groups(flow, members, made & stops, lambda v: v not in made and not flow.is_movement(v))
    except Blocked:
        return
    expected = [{r.value for r in g.roots} for g in merged_by_starting_over(found)]
    assert [{r.value for r in g.roots} for g in dominants.merge(found)] == expected


def test_a_long_chain_of_reductions_is_merged_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair of groups is tried once: 200 softmaxes took minutes when the search began anew after every merge."""
    b = Builder("chain")
    x = b.input("x", dtypes.FLOAT32, (4, 8))
    for _ in range(12):
        e = b.unary("exp", b.sub(x, b.reduce("reduce_max", x, [1], keepdims=True)))
        x = b.add(x, b.div(e, b.reduce("reduce_sum", e, [1], keepdims=True)))
    tried: list[tuple[Group, Group]] = []
    join = dominants._join

    def watched(current: Sequence[Group], j: int, k: int, *more: Any) -> Group | None:
        tried.append((current[j], current[k]))
        return join(current, j, k, *more)

    monkeypatch.setattr(dominants, "_join", watched)
    pipeline.cut(b.finish({"y": x}), pipeline.SCHEMES[-1], pipeline.BUDGET)
    assert len(tried) > 100
    assert len(set(tried)) == len(tried)


def cut(name: str, schemes: Sequence[Scheme] = pipeline.SCHEMES[-1], budget: int = pipeline.BUDGET) -> Stitched:
    return pipeline.cut(hand_graphs.graph(name), schemes, budget)


def count(kernel: Kernel, placement: Placement) -> int:
    return list(kernel.placements.values()).count(placement)


# ------------------------------------------------------------------ properties


@settings(max_examples=60)
@given(graphs(exact=False), st.booleans(), st.booleans())
def test_clusters_never_form_a_cycle(case: Case, memory_bound: bool, epilogues: bool) -> None:
    graph = materialise(simplify(case.graph))
    stops = {v for n in graph.nodes if n.prim in ("scatter", "host") for v in n.inputs} | set(graph.outputs)
    flow = Flow(graph, stops)
    found = clusters.grow(flow, memory_bound, epilogues)
    done: set[int] = set()
    seen = []
    for members in found.sorted():  # asserts that there is an order
        home = {found.of[n] for n in members}
        assert len(home) == 1
        assert found.before[min(home)] <= done
        done |= home
        seen += members
    assert len(seen) == len(set(seen)) == len([n for n in graph.nodes if flow.is_computed(n)])
    for k, members in found.members.items():
        makers = {flow.producer.get(e.value) for n in members for e in flow.reads(n)}
        assert found.before[k] == {found.of[p] for p in makers if p in found.of} - {k}
        assert all(k in found.after[j] for j in found.before[k])
    # It says of any two, in either order, whether they could be one more: whether there is no way round.
    for a, b in itertools.combinations(sorted(found.members)[:8], 2):
        assert (
            found.can_merge(a, b)
            == found.can_merge(b, a)
            == (not _way_round(found, a, b) and not _way_round(found, b, a))
        )
    # The edges that it keeps while merging are those of the graph.
    for n in found.nodes:
        for e in flow.reads(n):
            p = flow.producer.get(e.value)
            if p in found.of and found.of[p] != found.of[n]:
                assert found.of[p] in found.before[found.of[n]]
                assert found.of[n] in found.after[found.of[p]]


@settings(max_examples=60)
@given(graphs(exact=False), st.sampled_from(pipeline.SCHEMES), st.sampled_from([0, 64, pipeline.BUDGET]))
def test_every_cut_is_sound(case: Case, schemes: tuple[Scheme, ...], budget: int) -> None:
    stitched = pipeline.cut(case.graph, schemes, budget)  # checked there
    for kernel in stitched.kernels:
        if "global" not in schemes:
            assert len(kernel.phases) <= 1
        for phase in kernel.phases:
            if "regional" not in schemes and phase.contraction is None:
                assert len(phase.groups) == 1
            for g in phase.groups:
                assert (
                    set(phase.parallel) - {a for a in phase.parallel if a.extent == 1} <= set(g.axes)
                    or len(phase.groups) == 1
                )
                for r in g.roots:
                    inside = {a for i in r.store for a in i.axes()} - set(phase.parallel)
                    if kernel.placements[r.value] == "register":
                        assert not inside, "a register holds one number"
                    if kernel.placements[r.value] == "tile":
                        readers = [x for h in kernel.groups for x in h.accesses if x.value is r.value]
                        here = [x for h in phase.groups for x in h.accesses if x.value is r.value]
                        assert len(readers) == len(here), "a tile is read in its own phase only"


def _way_round(found: clusters.Clusters, start: int, goal: int) -> bool:
    """Whether a path leads from one cluster to another through a third, by trying all."""
    return any(_leads_to(found, k, goal) for k in found.after[start] - {goal})


def _leads_to(found: clusters.Clusters, start: int, goal: int) -> bool:
    return start == goal or any(_leads_to(found, k, goal) for k in found.after[start])


def test_a_cut_out_of_order_is_found() -> None:
    stitched = cut("residual")
    with pytest.raises(AssertionError, match="before they are written"):
        replace(stitched, kernels=stitched.kernels[::-1]).check()
    with pytest.raises(AssertionError, match="again"):
        replace(stitched, kernels=(*stitched.kernels, stitched.kernels[-1])).check()
    with pytest.raises(AssertionError, match="not written"):
        replace(stitched, kernels=stitched.kernels[:-1]).check()


def test_a_path_that_leaves_and_comes_back_keeps_clusters_apart() -> None:
    """x feeds a matmul and, with its result, an addition: the three cannot be one kernel."""
    b = Builder()
    x = b.unary("exp", b.input("x", dtypes.FLOAT32, (N, 8)))
    turned = b.contract(x, b.const(np.ones((8, 8), np.float32)), [0, 1], [1, 2], [0, 2])
    y = b.add(b.reduce("reduce_sum", turned, [1]), b.reduce("reduce_sum", x, [1]))
    place = {
        n.prim: k
        for k, kernel in enumerate(pipeline.cut(b.finish({"y": y}), simplified=False).kernels)
        for n in kernel.nodes
    }
    assert place["exp"] < place["contract"] < place["add"]


# ------------------------------------------------------------------ structure

STRUCTURE: dict[str, list[tuple[int, ...]]] = {
    # of each kernel: phases, registers, tiles, buffers
    "softmax": [(1, 2, 1, 1)],
    "softmax_over_columns": [(1, 2, 1, 1)],
    "layer_norm_gelu": [(1, 4, 1, 1)],
    "rms_norm": [(1, 2, 0, 1)],
    "group_norm": [(1, 4, 0, 1)],
    "two_axes": [(2, 6, 2, 3)],
    "full_reduction": [(1, 0, 0, 1)],
    "batch_norm": [(1, 0, 0, 1)],
    "movement_chain": [(1, 0, 0, 1)],
    "linear_gelu": [(1, 0, 1, 1)],
    "pad_pool": [(1, 0, 0, 1)],
    "embedding": [(1, 3, 0, 1)],
    "concat": [(3, 0, 0, 2)],
    "residual": [(1, 3, 0, 1), (1, 0, 1, 1), (1, 0, 1, 1)],
    "attention": [(3, 2, 2, 1)],
    "scatter": [(1, 0, 0, 1), (0, 0, 0, 0), (1, 0, 0, 1)],
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_structure(name: str) -> None:
    """Kernels, phases, placements. Fewer would be progress: then change the numbers here."""
    found = [(len(k.phases), count(k, "register"), count(k, "tile"), count(k, "buffer")) for k in cut(name).kernels]
    wanted = STRUCTURE[name]
    assert [f[0] for f in found] == [w[0] for w in wanted], "phases of each kernel"
    assert [f[3] for f in found] == [w[3] for w in wanted], "buffers of each kernel"
    assert found == wanted


@pytest.mark.parametrize("name", ["softmax", "layer_norm_gelu", "rms_norm", "group_norm", "batch_norm", "embedding"])
def test_rows_are_parallel(name: str) -> None:
    """Every task is a row: the batch is a parallel axis, and nothing of a row leaves its task but the result."""
    (kernel,) = cut(name).kernels
    assert dims.symbol("n") in [a.extent for a in kernel.phases[0].parallel]
    assert kernel.writes() == cut(name).graph.outputs or len(kernel.writes()) == 1


def test_movement_is_no_kernel() -> None:
    (kernel,) = cut("movement_chain").kernels
    (group,) = kernel.groups
    (access,) = group.accesses
    assert access.value.name == "x"
    assert not kernel.placements.keys() - {r.value for r in group.roots}


def test_an_epilogue_reads_the_tile() -> None:
    for name in ("linear_gelu", "residual"):
        for kernel in cut(name).kernels:
            for phase in kernel.phases:
                if phase.contraction is not None:
                    assert kernel.placements[phase.contraction.node.output] == "tile"
                    assert len({n.prim for n in kernel.nodes}) > 1


def test_what_a_reader_makes_of_what_it_gets_anyway_is_not_stored() -> None:
    """h = x w + r is stored, and read by a norm behind that is a kernel of its own: its squares are not."""
    b = Builder()
    x, r = (b.input(name, dtypes.FLOAT32, (N, 64)) for name in "xr")
    weight = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    h = b.add(b.contract(x, b.const(weight), [0, 1], [1, 2], [0, 2]), r)
    scale = b.unary("rsqrt", b.mean(b.mul(h, h), [1], True))
    other = b.contract(b.mul(h, scale), b.const(weight), [0, 1], [1, 2], [0, 2])
    graph = materialise(simplify(b.finish({"y": b.add(other, h)})))
    flow = Flow(graph, graph.outputs)
    found = clusters.grow(flow)
    first = next(n for n in graph.nodes if n.prim == "contract")
    home = found.members[found.of[first]]
    assert [n.prim for n in home] == ["contract", "add"]


def test_a_concat_is_written_in_pieces() -> None:
    kernel = cut("concat").kernels[0]
    pieces = [r for g in kernel.groups for r in g.roots if r.is_piece]
    assert [r.value.shape for r in pieces] == [(N, 27)] * 3
    assert sorted(str(r.store[1].offset) for r in pieces) == ["0", "10", "17"]


def test_the_transcendental_of_softmax_is_computed_once() -> None:
    (kernel,) = cut("softmax").kernels
    exps = [r for g in kernel.groups for r in g.roots if r.value.name.startswith("exp")]
    assert len(exps) == 1
    readers = [g for g in kernel.groups if any(n.prim == "exp" for n in g.nodes)]
    assert len(readers) == 1, "exp is evaluated in one group only"


def test_a_rounded_value_that_several_dominants_need_is_computed_once() -> None:
    """Two copies of a product could differ in the last bit, when one of them is contracted with an addition."""
    b = Builder()
    x = b.input("x", dtypes.FLOAT32, (N, 40))
    product = b.mul(x, b.add(x, 0.1))
    shifted = b.sub(product, b.reduce("reduce_max", product, [1], True))
    (kernel,) = pipeline.cut(b.finish({"y": b.reduce("reduce_sum", shifted, [1])})).kernels
    assert sum(any(n.prim == "mul" for n in g.nodes) for g in kernel.groups) == 1


def test_reductions_over_different_axes_are_different_nests() -> None:
    b = Builder()
    x = b.input("x", dtypes.FLOAT32, (N, 40))
    graph = b.finish({str(axes): b.reduce("reduce_sum", x, axes) for axes in ([0], [1], [0, 1])})
    for kernel in pipeline.cut(graph).kernels:
        for group in kernel.groups:
            folded = [frozenset(group.axes) - {a for i in r.store for a in i.axes()} for r in group.roots if r.fold]
            assert len(set(folded)) <= 1
    for n in (0, 1, 50):
        feeds = {"x": np.random.default_rng(n).integers(-9, 9, (n, 40)).astype(np.float32)}
        for got, want in zip(pipeline.native(graph, feeds), evaluate(graph, feeds), strict=True):
            np.testing.assert_array_equal(got, want)


def test_a_tile_is_where_its_reader_looks_for_it() -> None:
    """A piece of each row, read reversed, from the middle, and whole."""
    b = Builder()
    x = b.input("x", dtypes.FLOAT32, (N, 6, 20))
    e = b.unary("exp", b.sub(x, b.reduce("reduce_max", x, [1, 2], True)))
    total = b.reduce("reduce_sum", e, [1, 2], True)
    reversed_ = b.slice(e, [0, 5, 19], [N, 6, 20], [1, -1, -1])
    middle = b.slice(e, [0, 2, 3], [N, 3, 11], [1, 1, 1])
    graph = b.finish(
        {"r": b.div(reversed_, total), "m": b.div(b.transpose(middle, (0, 2, 1)), total), "e": b.div(e, total)}
    )
    feeds = {"x": np.random.default_rng(0).standard_normal((5, 6, 20)).astype(np.float32)}
    for schemes in pipeline.SCHEMES:
        for got, want in zip(pipeline.native(graph, feeds, schemes=schemes), evaluate(graph, feeds), strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-6)


# ------------------------------------------------------------------ schemes and budgets


def test_schemes_can_be_forced() -> None:
    for name in ("softmax", "layer_norm_gelu", "two_axes", "group_norm", "linear_gelu"):
        kernels = {schemes: len(cut(name, schemes).kernels) for schemes in pipeline.SCHEMES}
        assert kernels[("independent",)] > kernels[pipeline.SCHEMES[-1]]
        assert kernels[("independent",)] >= kernels[("independent", "local")]
        assert kernels[("independent", "local")] >= kernels[("independent", "local", "regional")]
    # Without the global scheme the two normalisations are kernels of their own; with it, phases of one.
    assert [len(k.phases) for k in cut("two_axes", ("independent", "local", "regional")).kernels] == [1, 1]
    assert [len(k.phases) for k in cut("two_axes").kernels] == [2]
    # Without the regional scheme nothing is in a tile or register but contractions' results.
    for name in ("softmax", "layer_norm_gelu", "two_axes"):
        for kernel in cut(name, ("independent", "local", "global")).kernels:
            assert set(kernel.placements.values()) == {"buffer"}
    # Without the local scheme a matmul has no epilogue.
    alone = cut("linear_gelu", ("independent", "regional", "global")).kernels
    assert [n.prim for n in alone[0].nodes] == ["contract"]


def test_a_small_budget_demotes_the_largest_tiles_first() -> None:
    b = Builder()
    x = b.input("x", dtypes.FLOAT32, (N, 100))
    e = b.unary("exp", b.sub(x, b.reduce("reduce_max", x, [-1], True)))
    half = b.cast(b.unary("tanh", e), dtypes.FLOAT16)
    total = b.reduce("reduce_sum", b.cast(half, dtypes.FLOAT32), [-1], True)
    graph = b.finish(
        {"y": b.div(b.add(e, b.cast(half, dtypes.FLOAT32)), b.add(b.reduce("reduce_sum", e, [-1], True), total))}
    )
    sizes = {}
    for budget in (1000, 599, 100):
        (kernel,) = pipeline.cut(graph, budget=budget).kernels
        tiles = [v for v, p in kernel.placements.items() if p == "tile"]
        sizes[budget] = sum(100 * v.dtype.itemsize for v in tiles)
        assert sizes[budget] <= budget
        assert ("over-budget" in kernel.reasons) == (budget < 1000 and bool(sizes[1000] > budget))
    assert sizes[1000] >= sizes[599] >= sizes[100]
    assert sizes[1000] > 0


@pytest.mark.parametrize("name", hand_graphs.GRAPHS)
def test_results(name: str) -> None:
    """Every scheme set and a tiny budget, two sizes from one compilation each, against numpy."""
    graph = hand_graphs.graph(name)
    cases = [hand_graphs.feeds(name, n, s) for n, s in [(5, 7), (1, 1), (18, 33)]]
    wanted = [evaluate(graph, feeds) for feeds in cases]
    for schemes, budget in [*((s, pipeline.BUDGET) for s in pipeline.SCHEMES), (pipeline.SCHEMES[-1], 64)]:
        artifact = pipeline.compile(graph, schemes, budget)
        for feeds, want in zip(cases, wanted, strict=True):
            for got, w in zip(pipeline.run(artifact, feeds, 2), want, strict=True):
                scale = float(np.abs(w).max(initial=1e-3))
                np.testing.assert_allclose(got, w, rtol=2e-5, atol=2e-5 * scale, err_msg=f"{schemes} {budget}")


@pytest.mark.parametrize("name", ["attention", "linear_gelu", "pad_pool", "two_axes", "concat", "movement_chain"])
def test_programs_stay_inside_their_buffers(name: str) -> None:
    """The interpreter faults where compiled code would read beyond an end, or what nobody stored."""
    graph = hand_graphs.graph(name)
    stitched = pipeline.cut(graph)
    made = {n.output for k in stitched.kernels for n in k.nodes}
    flow = Flow(stitched.graph, made | set(stitched.graph.outputs))
    target = targets.parse("avx2")
    for n, s in [(2, 3), (1, 17)]:
        env = {"n": n, "s": s}
        memory: dict[Value, np.ndarray] = {v: x.reshape(-1).copy() for v, x in zip(
            stitched.graph.inputs, hand_graphs.feeds(name, n, s).values(), strict=True)}  # fmt: skip
        memory |= {x.output: x.attrs["array"].reshape(-1) for x in stitched.graph.nodes if x.prim == "const"}
        for kernel in stitched.kernels:
            low = kernels.lower(kernel, flow, target)
            arrays = {}
            for buffer, p in zip(low.program.buffers, low.parameters, strict=True):
                if isinstance(p, Value):
                    made_here = np.zeros(dims.evaluate(p.size, env), p.dtype)
                    arrays[buffer] = memory.setdefault(p, made_here)
                else:
                    arrays[buffer] = np.full(p.size, 77, p.value.dtype)
                    p.pack(memory[p.value], arrays[buffer])
            interp.run(low.program, arrays, env, target)
        for v, want in zip(stitched.graph.outputs, evaluate(graph, hand_graphs.feeds(name, n, s)), strict=True):
            np.testing.assert_allclose(memory[v], want.reshape(-1), rtol=2e-5, atol=2e-5)
