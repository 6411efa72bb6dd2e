"""Teams of unlike members: chunks dealt by weight, members that take no part, and threads that stay on their CPUs."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stitch.codegen import assemble, machine
from stitch.evaluate import evaluate
from stitch.runtime import cpu
from stitch.runtime.executable import Executable
from stitch.runtime.shares import CPU_BYTES, cpu_bits, table
from stitch.runtime.threads import Team
from tests import pipeline, random_graphs
from tests.graphs import Case, graphs

CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]

# args: for each task, which worker ran it and on which CPU; the microseconds of a task, below zero: of the caller's
IR = """
declare void @stitch_share(ptr, ptr, ptr, i64, i64, ptr)
declare i32 @sched_getcpu()
declare i32 @usleep(i32)

define internal void @note(ptr %args, i64 %begin, i64 %end, i64 %worker) {
entry:
  %workers = load ptr, ptr %args
  %cpus_at = getelementptr ptr, ptr %args, i64 1
  %cpus = load ptr, ptr %cpus_at
  br label %loop
loop:
  %i = phi i64 [%begin, %entry], [%next, %task]
  %more = icmp slt i64 %i, %end
  br i1 %more, label %task, label %out
task:
  %worker_at = getelementptr i64, ptr %workers, i64 %i
  %old = load i64, ptr %worker_at
  %shifted = mul i64 %old, 100
  %plus = add i64 %shifted, %worker
  %new = add i64 %plus, 1
  store i64 %new, ptr %worker_at
  %here = call i32 @sched_getcpu()
  %wide = sext i32 %here to i64
  %cpu_at = getelementptr i64, ptr %cpus, i64 %i
  store i64 %wide, ptr %cpu_at
  %time_at = getelementptr i64, ptr %args, i64 2
  %time = load i64, ptr %time_at
  %negative = icmp slt i64 %time, 0
  %positive = sub i64 0, %time
  %caller = icmp eq i64 %worker, 0
  %callers = select i1 %caller, i64 %positive, i64 0
  %own_time = select i1 %negative, i64 %callers, i64 %time
  %short = trunc i64 %own_time to i32
  call i32 @usleep(i32 %short)
  %next = add i64 %i, 1
  br label %loop
out:
  ret void
}

define void @share(ptr %team, ptr %args, i64 %tasks, i64 %grain, ptr %table) {
  call void @stitch_share(ptr %team, ptr @note, ptr %args, i64 %tasks, i64 %grain, ptr %table)
  ret void
}

; Each chunk in the order in which they run: how many there are so far, then begin and end of each.
define internal void @list(ptr %args, i64 %begin, i64 %end, i64 %worker) {
  %number = load i64, ptr %args
  %more = add i64 %number, 1
  store i64 %more, ptr %args
  %two = mul i64 %number, 2
  %plus = add i64 %two, 1
  %begin_at = getelementptr i64, ptr %args, i64 %plus
  %end_at = getelementptr i64, ptr %begin_at, i64 1
  store i64 %begin, ptr %begin_at
  store i64 %end, ptr %end_at
  ret void
}

define void @lists(ptr %team, ptr %args, i64 %tasks, i64 %grain, ptr %table) {
  call void @stitch_share(ptr %team, ptr @list, ptr %args, i64 %tasks, i64 %grain, ptr %table)
  ret void
}
"""

linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are bound to CPUs on Linux only")


@pytest.fixture(scope="module")
def library() -> Iterator[cpu.Library]:
    library = cpu.Library(cpu.compile_ir(IR), ["share", "lists"], cpu.support())
    yield library
    library.close()


def call(library: cpu.Library, name: str, team: Team, args: np.ndarray, tasks: int, grain: int, words: object) -> None:
    signature = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2, ctypes.c_void_p)
    own = None if words is None else np.array(words, np.int32)
    signature(library[name])(team.address, args.ctypes.data, tasks, grain, None if own is None else own.ctypes.data)


def shared(
    library: cpu.Library, team: Team, tasks: int, words: Sequence[int] | None, micros: int = 0, grain: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Who ran each task, once, and where."""
    workers, cpus = np.zeros(tasks, np.int64), np.zeros(tasks, np.int64)
    args = np.array([workers.ctypes.data, cpus.ctypes.data, micros], np.int64)
    call(library, "share", team, args, tasks, grain, words)
    assert ((workers >= 1) & (workers < 100)).all(), "each task once"
    return workers - 1, cpus


@pytest.fixture(scope="module")
def alone() -> dict[int, Team]:
    """Teams whose workers have left: their callers do everything, in an order that follows from the rules."""
    teams = {size: Team(size, cpu.support()) for size in (2, 3, 5)}
    for team in teams.values():
        team.stop(10)
    return teams


def order(library: cpu.Library, team: Team, tasks: int, grain: int, words: Sequence[int]) -> list[tuple[int, int]]:
    args = np.zeros(2 * 200 + 1, np.int64)
    call(library, "lists", team, args, tasks, grain, words)
    return [(int(a), int(b)) for a, b in args[1 : 1 + 2 * args[0]].reshape(-1, 2)]


@given(st.data())
def test_shares_are_in_proportion_to_weights(library: cpu.Library, alone: dict[int, Team], data: st.DataObject) -> None:
    """The caller's share, from the front, then those of others from the back: so the borders can be told."""
    size = data.draw(st.sampled_from([2, 3, 5]))
    weights = [data.draw(st.integers(1, 20)), *(data.draw(st.integers(0, 20)) for _ in range(size - 1))]
    tasks, grain, most = data.draw(st.integers(2, 5000)), data.draw(st.integers(1, 50)), data.draw(st.integers(1, 40))
    found = order(library, alone[size], tasks, grain, table(most, weights))
    assert [a for a, _ in sorted(found)] == [0, *(b for _, b in sorted(found)[:-1])]
    assert sorted(found)[-1][1] == tasks
    if tasks <= grain:
        assert found == [(0, tasks)]
        return
    chunks = min(math.ceil(tasks / grain), most)
    assert len(found) == chunks
    numbers = [sorted(found).index(chunk) for chunk in found]
    reached = np.cumsum(weights) * chunks / sum(weights)
    borders = [0, *(math.floor(r + 0.5) for r in reached)]
    shares = [list(range(a, b)) for a, b in pairwise(borders)]
    assert numbers == [*shares[0], *(k for share in shares[1:] for k in reversed(share))]


def test_a_table_for_a_team_of_another_size_says_nothing(library: cpu.Library, alone: dict[int, Team]) -> None:
    equal = order(library, alone[3], 1000, 1, table(8, [1, 1]))
    assert len(equal) == 12
    assert len(order(library, alone[2], 1000, 1, table(16, [3, 1]))) == 16


@pytest.mark.parametrize("wrong", [(0, [1, 1]), (4, []), (4, [0, 1]), (4, [1, -1])])
def test_wrong_tables(wrong: tuple[int, list[int]]) -> None:
    with pytest.raises(ValueError, match="cannot be dealt"):
        table(*wrong)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_members_without_weight_take_no_part(library: cpu.Library, size: int) -> None:
    """Not even when all others are late, and whatever regions come before and after."""
    team = Team(size, cpu.support())
    for turn in range(60):
        absent = 1 + turn % (size - 1)
        weights = [int(m != absent) for m in range(size)]
        workers, _ = shared(library, team, 40, table(4 * size, weights), micros=20)
        assert absent not in workers
        workers, _ = shared(library, team, 40, None if turn % 2 else table(8, [1] * size), micros=20)
        assert set(workers) <= set(range(size))
    team.stop(10)
    workers, _ = shared(library, team, 40, table(8, [1] * size))
    assert not workers.any(), "the caller does what is left when all workers are gone"


def test_a_slow_member_leaves_the_last_chunks_to_others(library: cpu.Library) -> None:
    """Of eight chunks the caller has six, and takes long; the other is done with its own at once. It takes over all but
    the last two, however late the caller is."""
    team = Team(2, cpu.support())
    for _ in range(60):
        workers, _ = shared(library, team, 8, table(8, [3, 1]), micros=-1000)
        assert (workers == 0).sum() >= 2, workers
    team.stop(10)


@linux
def test_members_stay_on_their_cpus(library: cpu.Library) -> None:
    """Workers are on their member's CPUs, whatever the caller's are; when the team is given back, they forget them."""
    places = [[CPUS[k % len(CPUS)]] for k in (0, 1, 0)]
    team = cpu.own_team(3, places)
    assert team is not None
    for _ in range(30):
        workers, cpus = shared(library, team, 60, table(12, [1, 1, 1]), micros=50)
        for worker, at in zip(workers, cpus, strict=True):
            assert worker == 0 or at in places[worker]
    assert len(set(workers)) > 1
    cpu.give_back(team)
    again = cpu.own_team(3)
    assert again is team
    shared(library, again, 60, None, micros=50)
    cpu.give_back(again)


def test_bits_of_cpus() -> None:
    bits = cpu_bits([0, 9, 63, 64, 8 * CPU_BYTES, 1 << 20])
    assert len(bits) == CPU_BYTES
    assert (bits[0], bits[1], bits[7], bits[8]) == (1, 2, 128, 1)
    assert int.from_bytes(bits, "little").bit_count() == 4


@st.composite
def tables_for(draw: st.DrawFn, phases: Sequence[int], size: int) -> dict[str, list[tuple[int, ...]]]:
    """Any tables for kernels of so many phases: nothing, the caller alone, some weights, a team of another size."""

    def words() -> tuple[int, ...]:
        kind = draw(st.sampled_from(["none", "alone", "weights", "other"]))
        if kind in ("none", "alone"):
            return () if kind == "none" else (1,)
        members = size if kind == "weights" else size + 1
        weights = [draw(st.integers(1, 9)), *(draw(st.integers(0, 9)) for _ in range(members - 1))]
        return table(draw(st.integers(1, 40)), weights)

    return {f"k{k}": [words() for _ in range(n)] for k, n in enumerate(phases)}


@settings(max_examples=40)
@given(graphs(exact=True), st.sampled_from(random_graphs.SIZES), st.data())
def test_the_same_bits_however_work_is_shared(case: Case, sizes: dict[str, int], data: st.DataObject) -> None:
    graph = random_graphs.exact(case.graph)
    assume(random_graphs.has_one_answer(graph))
    stitched = pipeline.cut(graph)
    lowered = assemble.lower(stitched, pipeline.host())
    phases = [(k.name, len(lowered[k.name].program.phases)) for k in stitched.kernels if k.name in lowered]
    found = data.draw(tables_for([n for _, n in phases], 3))
    tables = dict(zip([name for name, _ in phases], found.values(), strict=True))
    host = pipeline.host()
    artifact = assemble.assemble(stitched, host, lambda text: machine.compile(text, host), {}, lowered, tables)
    team = cpu.own_team(3)
    assert team is not None
    executable = Executable(artifact, 3, team=team)
    feeds = [case.feeds]
    if random_graphs.fits(graph, sizes):
        feeds.append(random_graphs.feeds(graph, sizes, 0, True))
    for feed in feeds:
        got = executable.run([np.asarray(feed[p.name]) for p in artifact.inputs])
        for a, b in zip(got, evaluate(graph, feed), strict=True):
            np.testing.assert_array_equal(a, b, strict=True)
    cpu.give_back(team)
