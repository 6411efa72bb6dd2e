"""The arena: places of values, and results in the place of an operand."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stitch import access, compiler, dims, dtypes
from stitch import target as targets
from stitch.access import Axis
from stitch.codegen import arena, assemble, inplace, interp, kernels
from stitch.codegen.arena import Lifetime, Memory
from stitch.codegen.loops import (
    Apply,
    Buffer,
    Clip,
    Contract,
    ContractLoop,
    Define,
    Fold,
    Local,
    Loop,
    Phase,
    Program,
    Read,
    Store,
    Transpose,
    Use,
)
from stitch.dims import Dim
from stitch.graph import Builder, Graph, Value
from stitch.knobs import Scheme
from stitch.ops.primitives import Array
from stitch.plan import Artifact
from stitch.stitching.trace import Flow
from tests import pipeline, random_graphs
from tests.graphs import Case, graphs
from tests.test_random_graphs import TINY, examples, schemes_and_budgets

F32 = dtypes.FLOAT32
AVX512 = targets.NAMES["avx512"]
N, M = dims.symbol("n"), dims.symbol("m")

# ------------------------------------------------------------------ the proof, on loops written by hand


def buffer(name: str, size: Dim = 60, dtype: np.dtype = F32) -> Buffer:
    return Buffer(name, dtype, size)


def pairs(phase: Phase, *buffers: Buffer) -> set[tuple[str, str]]:
    return {(a.name, b.name) for a, b in inplace.replaceable(phase, buffers, buffers)}


def doubled(e: Read) -> Apply:
    return Apply("add", (e, e), F32)


def rows(
    x: Buffer, y: Buffer, reread: tuple[Dim, Dim] = (6, 1), outer: Axis | None = None, clip: Clip | None = None
) -> Phase:
    """y = x - max over the row, where the first loop reads x at the place `reread` says."""
    p = outer or Axis("p", 10)
    i, j = Axis("i", 6), Axis("j", 6)
    top = Local("top", F32)
    first = Loop(i, (), (Fold(top, "max", Read(x, access.index(0, (p, reread[0]), (i, reread[1])))),), clip=clip)
    at = access.index(0, (p, 6), (j, 1))
    second = Loop(j, (Store(y, at, Apply("sub", (Read(x, at), Use(top)), F32)),))
    return Phase((p,), (first, second))


def test_elementwise_and_rows_are_proved() -> None:
    x, y, i = buffer("x"), buffer("y"), Axis("i", 60)
    at = access.of(i)
    assert pairs(Phase((i,), (Store(y, at, doubled(Read(x, at))),)), x, y) == {("y", "x")}
    assert pairs(rows(x, y), x, y) == {("y", "x")}


def test_only_what_is_born_or_dies_is_asked_for() -> None:
    x, y = buffer("x"), buffer("y")
    assert inplace.replaceable(rows(x, y), [y], []) == []
    assert inplace.replaceable(rows(x, y), [], [x]) == []


@pytest.mark.parametrize(
    ("phase", "why"),
    [
        (lambda x, y: rows(x, y, reread=(1, 10)), "columns are read where rows are stored"),
        (lambda x, y: rows(x, y, reread=(6, 0)), "another task's element"),
        (lambda x, y: rows(x, y, clip=Clip(6, Axis("q", 10), 60)), "a loop that ends early"),
        (lambda x, y: _phase(x, y, shift=1), "a neighbour"),
        (lambda x, y: _phase(x, y, again=True), "read after the store"),
        (lambda x, y: _phase(x, y, folded=True), "folded after the store"),
        (lambda x, y: _transposed(x, y), "a transpose"),
        (lambda x, y: _packed(x, y), "a contraction's operand"),
    ],
    ids=lambda v: v.replace(" ", "-") if isinstance(v, str) else "",
)
def test_not_proved(phase: object, why: str) -> None:
    x, y = buffer("x"), buffer("y")
    made = phase(x, y)  # type: ignore[operator]
    assert pairs(made, x, y) == set(), why


def _phase(x: Buffer, y: Buffer, shift: int = 0, again: bool = False, folded: bool = False) -> Phase:
    p, j = Axis("p", 10), Axis("j", 5)
    at = access.index(0, (p, 6), (j, 1))
    body: list[Store | Define] = [Store(y, at, doubled(Read(x, at.plus(shift))))]
    if again:
        body.append(Define(Local("later", F32), Read(x, at)))
    folds = (Fold(Local("total", F32), "add", Read(x, at)),) if folded else ()
    return Phase((p,), (Loop(j, tuple(body), folds),))


def _transposed(x: Buffer, y: Buffer) -> Phase:
    return Phase((), (Transpose(y, access.ZERO, 6, x, access.ZERO, 10, Axis("r", 10), Axis("c", 6)),))


def _packed(x: Buffer, y: Buffer) -> Phase:
    tile, b, i = Buffer("t", F32, 16, "tile"), buffer("b", 16), Axis("i", 60)
    heavy = Contract(tile, 1, 1, x, access.of(i), 1, b, access.ZERO, (ContractLoop(1, 1, 1),))
    return Phase((i,), (heavy, Store(y, access.of(i), doubled(Read(x, access.of(i))))))


def test_elements_must_be_equally_large_and_as_many() -> None:
    i = Axis("i", 60)
    for other in (buffer("y", dtype=dtypes.FLOAT64), buffer("y", 61), buffer("y", dtype=dtypes.FLOAT16)):
        x = buffer("x")
        value = Apply("cast", (Read(x, access.of(i)),), dtypes.compute(other.dtype))
        assert pairs(Phase((i,), (Store(other, access.of(i), value),)), x, other) == set()


def test_a_loop_that_occurs_twice_is_two_loops() -> None:
    """Its first occurrence's read is not before the store of the first, though it is before that of the second."""
    x, y, p, j = buffer("x"), buffer("y"), Axis("p", 10), Axis("j", 6)
    at = access.index(0, (p, 6), (j, 1))
    zero = Local("z", F32)
    loop = Loop(j, (Store(y, at, Use(zero)), Define(Local("late", F32), Read(x, at))))
    phase = Phase((p,), (Define(zero, Read(buffer("o"), access.ZERO)), loop, loop))
    assert pairs(phase, x, y) == set()


# ------------------------------------------------------------------ the proof, on random kernels


class _Shuffled(interp._Machine):
    """Runs tasks in an order of its own."""

    def points(self, phase: Phase) -> list[tuple[int, ...]]:
        found = list(itertools.product(*(range(self.dim(a.extent)) for a in phase.axes)))
        return [found[k] for k in np.random.default_rng(len(found)).permutation(len(found))]


def _ran(program: Program, phase: Phase, arrays: Mapping[Buffer, Array], sizes: Mapping[str, int]) -> None:
    with np.errstate(all="ignore"):
        _Shuffled(program, arrays, sizes, pipeline.host()).run_phase(phase)


@settings(max_examples=examples(60))
@given(graphs(exact=True), schemes_and_budgets, st.sampled_from([{"n": 3, "m": 2}, {"n": 5, "m": 1}]))
def test_what_is_proved_gives_the_same_in_any_order_of_tasks(
    case: Case, how: tuple[tuple[Scheme, ...], int], sizes: dict[str, int]
) -> None:
    """Every pair that is proved, whether or not the values live so, by the interpreter, in one memory."""
    assume(random_graphs.fits(case.graph, sizes, 400))
    stitched = pipeline.cut(case.graph, *how)
    flow = Flow(stitched.graph, {v for k in stitched.kernels for v in k.writes()} | set(stitched.graph.outputs))
    rng = np.random.default_rng(1)
    for k in stitched.kernels:
        if k.opaque is not None:
            continue
        program = kernels.lower(k, flow, pipeline.host()).program
        arrays = {b: rng.integers(0, 3, dims.evaluate(b.size, sizes)).astype(b.dtype) for b in program.buffers}
        for phase in program.phases:
            before = {b: a.copy() for b, a in arrays.items()}
            _ran(program, phase, arrays, sizes)
            for to, source in inplace.replaceable(phase, program.buffers, program.buffers):
                memory = {b: a.copy() for b, a in before.items()}
                memory[to] = memory[source].view(to.dtype)
                _ran(program, phase, memory, sizes)
                for b, a in memory.items():
                    if b is not source:
                        assert a.tobytes() == arrays[b].tobytes(), f"{to.name} in the place of {source.name}"


# ------------------------------------------------------------------ places


sizes_ = st.sampled_from([64, 192, 4096, 64 * N, 128 * N, 64 * M, 64 * N * M, 64 * N * N, 64 * dims.ceil_div(N, 3)])
lives = st.lists(st.tuples(sizes_, st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=12)
AT: Sequence[Mapping[str, int]] = [{"n": n, "m": m} for n in (0, 1, 2, 7, 64, 1000) for m in (0, 1, 5, 300)]


def lifetimes(found: Sequence[tuple[Dim, int, int]]) -> list[Lifetime]:
    return [Lifetime(Value(f"v{k}", F32, ()), size, at, at + n) for k, (size, at, n) in enumerate(found)]


@given(lives)
def test_values_that_live_together_are_apart_at_all_sizes(found: list[tuple[Dim, int, int]]) -> None:
    made = lifetimes(found)
    offsets, total = arena._Placing(made).best()
    for env in AT:
        spans = [(dims.evaluate(offsets[x], env), dims.evaluate(x.size, env)) for x in made]
        assert all(at >= 0 and at % arena.ALIGNMENT == 0 for at, _ in spans)
        assert max(at + size for at, size in spans) == dims.evaluate(total, env)
        for (x, (at, size)), (y, (other, wide)) in itertools.combinations(zip(made, spans, strict=True), 2):
            if x.first <= y.last and y.first <= x.last:
                assert at + size <= other or other + wide <= at


@given(lives)
def test_without_symbols_the_arena_is_near_what_lives_at_once(found: list[tuple[Dim, int, int]]) -> None:
    made = lifetimes([(dims.evaluate(size, {"n": 3, "m": 2}), at, n) for size, at, n in found])
    placing = arena._Placing(made)
    total = placing.best()[1]
    assert isinstance(total, int)
    assert placing.floor[0] <= total <= 1.5 * placing.floor[0]


# ------------------------------------------------------------------ whole graphs


def planned(graph: Graph, schemes: Sequence[Scheme], budget: int, replacing: bool = True) -> tuple[Artifact, Memory]:
    """The artifact of a graph, and the memory of its last native step."""
    found: list[Memory] = []
    make = arena.plan

    def noted(*given: object) -> Memory:
        found.append(make(*given))  # type: ignore[arg-type]
        return found[-1]

    with mock.patch.object(arena, "plan", noted):
        if replacing:
            return pipeline.compile(graph, schemes, budget), found[-1]
        with mock.patch.object(inplace, "replaceable", return_value=[]):
            return pipeline.compile(graph, schemes, budget), found[-1]


STEPS = ("abs", "residual", "row", "column", "softmax", "turn", "shift", "cast", "half", "heavy", "pair")


def chained(steps: Sequence[tuple[str, int]], fixed: bool) -> Graph:
    """A graph of many kernels over one shape, in which most values die soon. `steps`: what is done, and to which of
    the last values."""
    b = Builder()
    side: Dim = 6 if fixed else N
    values = [b.input("x", F32, (M, side, side)), b.input("y", F32, (M, side, side))]
    for what, back in steps:
        x, other = values[-1], values[-1 - back % len(values)]
        match what:
            case "abs":
                made = b.unary("abs", x)
            case "residual":
                made = b.sub(x, other)
            case "row":
                made = b.sub(x, b.reduce("reduce_max", x, (2,), keepdims=True))
            case "column":
                made = b.add(x, b.reduce("reduce_min", other, (1,), keepdims=True))
            case "softmax":
                top = b.elementwise("exp", b.sub(x, b.reduce("reduce_max", x, (2,), keepdims=True)))
                made = b.div(top, b.reduce("reduce_sum", top, (2,), keepdims=True))
            case "turn":
                made = b.add(b.transpose(x, (0, 2, 1)), 1.0)
            case "shift":
                inner = b.slice(x, (0, 1, 0), (M, side - 1, side))
                made = b.pad(b.mul(inner, 2.0), (0, 0, 0), (0, 1, 0))
            case "cast":
                made = b.cast(b.add(b.cast(b.max(b.min(x, 99.0), -99.0), dtypes.INT32), 1), F32)
            case "half":
                made = b.cast(b.cast(x, dtypes.FLOAT16), F32)
            case "heavy":
                product = b.contract(x, values[back % 2], (0, 1, 2), (0, 2, 3), (0, 1, 3))
                made = b.add(b.mul(product, 0.125), x)
            case _:
                values.append(b.max(x, other))
                made = b.min(x, other)
        values.append(made)
    return b.finish({"z": values[-1], "w": values[-1 - len(steps) // 2]})


@settings(max_examples=examples(60))
@given(
    st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 3)), min_size=3, max_size=14),
    st.sampled_from(pipeline.SCHEMES),
    st.booleans(),
)
def test_results_in_place_have_the_same_bits(
    steps: list[tuple[str, int]], schemes: tuple[Scheme, ...], fixed: bool
) -> None:
    graph = chained(steps, fixed)
    (replacing, after), (plain, before) = (planned(graph, schemes, TINY, way) for way in (True, False))
    score = arena._Placing(before.lifetimes).score
    assert score(after.total) <= score(before.total)
    for n, m in ((6, 1), (6, 3)) if fixed else ((1, 2), (5, 3), (17, 2), (40, 1)):
        sizes = {"n": n, "m": m}
        feeds = random_graphs.feeds(graph, sizes, n, True)
        want = pipeline.run(plain, feeds)
        for threads in (1, 3):
            assert pipeline.same_bits(pipeline.run(replacing, feeds, threads), want)


@pytest.mark.parametrize("step", ["softmax", "row", "residual"])
def test_operators_between_matmuls_take_the_place_of_their_operand(step: str) -> None:
    graph = chained([("heavy", 1), (step, 1)] * 4, False)
    (_, after), (_, before) = (planned(graph, ("independent",), TINY, way) for way in (True, False))
    assert after.replaced
    for env in ({"n": 50, "m": 1}, {"n": 7, "m": 3}):
        assert dims.evaluate(after.total, env) < dims.evaluate(before.total, env)


def test_a_place_that_only_several_values_together_show_is_found() -> None:
    """One proof left a value out of a maximum that another one could not see to be below it: for ever."""
    n, s = dims.symbol("n"), dims.symbol("s")
    a, b, c = (64 * dims.ceil_div(d, 64) for d in (16 * n * s, 32 * n * s, 8 * n * s * s))
    sizes = [a, 64 * n * s + b, b, c, b, a, b, b, b, b, b, a, a, 64 * n, 64 * n]
    first = [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 12, 13, 14]
    last = [1, 5, 3, 5, 6, 12, 11, 10, 11, 11, 12, 13, 15, 14, 15]
    lives = [Lifetime(Value(f"v{k}", F32, ()), *given) for k, given in enumerate(zip(sizes, first, last, strict=True))]
    offsets, total = arena._Placing(lives).best()
    for env in ({"n": 1, "s": 1}, {"n": 3, "s": 17}, {"n": 1, "s": 512}, {"n": 512, "s": 1}):
        spans = {x: (dims.evaluate(at, env), dims.evaluate(at + x.size, env)) for x, at in offsets.items()}
        assert max(end for _, end in spans.values()) <= dims.evaluate(total, env)
        for x, y in itertools.combinations(lives, 2):
            if x.first <= y.last and y.first <= x.last:
                assert spans[x][1] <= spans[y][0] or spans[y][1] <= spans[x][0]


def test_places_do_not_depend_on_where_objects_are() -> None:
    """The least and the most of all elements have partial results of one name, born and dying together."""

    def places() -> tuple[object, ...]:
        b = Builder()
        x = b.input("x", F32, (1 << 18,))
        span = b.sub(b.reduce("reduce_max", x, [0]), b.reduce("reduce_min", x, [0]))
        stitched = compiler.cut(b.finish({"y": b.div(x, span)}), AVX512)
        texts: list[str] = []

        def emit(text: str) -> bytes:
            texts.append(text)
            return b""

        assemble.assemble(stitched, AVX512, emit, {})
        return tuple(texts)

    kept = []
    for _ in range(12):
        kept.append((places(), [object() for _ in range(99)]))  # what is kept moves what comes after
    assert len({texts for texts, _ in kept}) == 1
