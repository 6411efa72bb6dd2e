"""The thread team: every task once, whatever else is going on. Nothing here depends on how long things take."""

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stitch.runtime import cpu
from stitch.runtime.team import CHUNKS_PER_WORKER, SLEEPERS, WAKING, WORD
from stitch.runtime.threads import Team, available_cores

# args: count per task, whether a worker number is in use, how often one was used twice at a time
IR = """
declare void @stitch_parallel(ptr, ptr, ptr, i64, i64)
declare i32 @usleep(i32)

define internal void @count(ptr %args, i64 %begin, i64 %end, i64 %worker) {
entry:
  %counts = load ptr, ptr %args
  %using_at = getelementptr ptr, ptr %args, i64 1
  %using = load ptr, ptr %using_at
  %clashes_at = getelementptr ptr, ptr %args, i64 2
  %clashes = load ptr, ptr %clashes_at
  %mine = getelementptr i64, ptr %using, i64 %worker
  %was = atomicrmw xchg ptr %mine, i64 1 acq_rel
  %clash = atomicrmw add ptr %clashes, i64 %was monotonic
  br label %loop
loop:
  %i = phi i64 [%begin, %entry], [%next, %done]
  %more = icmp slt i64 %i, %end
  br i1 %more, label %task, label %out
task:
  %at = getelementptr i64, ptr %counts, i64 %i
  %old = load i64, ptr %at
  %new = add i64 %old, 1
  store i64 %new, ptr %at
  %uneven = urem i64 %i, 13
  %turns = mul i64 %uneven, 40
  br label %work
work:
  %t = phi i64 [0, %task], [%t_next, %work]
  %t_next = add i64 %t, 1
  %dummy = load volatile i64, ptr %at
  %on = icmp slt i64 %t_next, %turns
  br i1 %on, label %work, label %done
done:
  %next = add i64 %i, 1
  br label %loop
out:
  store atomic i64 0, ptr %mine release, align 8
  ret void
}

define void @regions(ptr %team, ptr %args, i64 %tasks, i64 %grain, i64 %count) {
entry:
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %loop]
  call void @stitch_parallel(ptr %team, ptr @count, ptr %args, i64 %tasks, i64 %grain)
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %count
  br i1 %more, label %loop, label %out
out:
  ret void
}

; A region inside each task of a region.
define internal void @outer(ptr %args, i64 %begin, i64 %end, i64 %worker) {
entry:
  %team_at = getelementptr ptr, ptr %args, i64 3
  %team = load ptr, ptr %team_at
  br label %loop
loop:
  %i = phi i64 [%begin, %entry], [%next, %body]
  %more = icmp slt i64 %i, %end
  br i1 %more, label %body, label %out
body:
  %row = mul i64 %i, 3
  %inner = getelementptr ptr, ptr %args, i64 4
  %mine = getelementptr ptr, ptr %inner, i64 %row
  call void @stitch_parallel(ptr %team, ptr @count, ptr %mine, i64 50, i64 1)
  %next = add i64 %i, 1
  br label %loop
out:
  ret void
}

define void @nested(ptr %team, ptr %args, i64 %tasks) {
  call void @stitch_parallel(ptr %team, ptr @outer, ptr %args, i64 %tasks, i64 1)
  ret void
}

; Workers take much longer than the caller.
define internal void @late(ptr %args, i64 %begin, i64 %end, i64 %worker) {
  %other = icmp ne i64 %worker, 0
  %time = select i1 %other, i32 2000, i32 50
  call i32 @usleep(i32 %time)
  call void @count(ptr %args, i64 %begin, i64 %end, i64 %worker)
  ret void
}

define void @wait(ptr %team, ptr %args, i64 %tasks) {
  call void @stitch_parallel(ptr %team, ptr @late, ptr %args, i64 %tasks, i64 1)
  ret void
}

; Writes down each range in order: args are how many there are so far, and where they are.
define internal void @note(ptr %args, i64 %begin, i64 %end, i64 %worker) {
  %number = load i64, ptr %args
  %more = add i64 %number, 1
  store i64 %more, ptr %args
  %list_at = getelementptr ptr, ptr %args, i64 1
  %list = load ptr, ptr %list_at
  %two = mul i64 %number, 2
  %begin_at = getelementptr i64, ptr %list, i64 %two
  %end_at = getelementptr i64, ptr %begin_at, i64 1
  store i64 %begin, ptr %begin_at
  store i64 %end, ptr %end_at
  ret void
}

define void @notes(ptr %team, ptr %args, i64 %tasks, i64 %grain) {
  call void @stitch_parallel(ptr %team, ptr @note, ptr %args, i64 %tasks, i64 %grain)
  ret void
}
"""


@pytest.fixture(scope="module")
def library() -> Iterator[cpu.Library]:
    library = cpu.Library(cpu.compile_ir(IR), ["regions", "nested", "wait", "notes"], cpu.support())
    yield library
    library.close()


@pytest.fixture(params=[1, 2, 3, 4])
def team(request: pytest.FixtureRequest) -> Team:
    return Team(request.param, cpu.support())


def count(library: cpu.Library, team: int | None, tasks: int, grain: int, regions: int) -> np.ndarray:
    """How often each task was run, after so many regions."""
    counts, using, clashes = np.zeros(max(tasks, 1), np.int64), np.zeros(64, np.int64), np.zeros(1, np.int64)
    args = np.array([counts.ctypes.data, using.ctypes.data, clashes.ctypes.data], np.int64)
    signature = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3)
    signature(library["regions"])(team, args.ctypes.data, tasks, grain, regions)
    assert clashes[0] == 0
    return counts[:tasks]


@pytest.mark.parametrize(
    ("tasks", "grain"), [(0, 1), (1, 1), (2, 1), (3, 1), (7, 0), (100, 1), (97, 10), (100, 100), (101, 100), (5000, 3)]
)
def test_every_task_runs_once(library: cpu.Library, team: Team, tasks: int, grain: int) -> None:
    assert (count(library, team.address, tasks, grain, 50) == 50).all()
    assert (count(library, None, tasks, grain, 2) == 2).all()


def test_many_regions(library: cpu.Library, team: Team) -> None:
    assert (count(library, team.address, 9, 1, 20_000) == 20_000).all()


def test_workers_are_started_by_the_first_region(library: cpu.Library) -> None:
    team = Team(3, cpu.support())
    count(library, team.address, 10, 10, 1)
    assert team.workers == 0
    count(library, team.address, 10, 1, 1)
    assert team.workers == 2
    team.stop(10)
    assert team.workers == 0
    assert (count(library, team.address, 10, 1, 5) == 5).all()


@pytest.fixture(scope="module")
def alone() -> dict[int, Team]:
    """Teams whose workers have left: their callers do everything, in an order that follows from the rules."""
    teams = {size: Team(size, cpu.support()) for size in (2, 3, 5)}
    for team in teams.values():
        team.stop(10)
    return teams


def ranges(library: cpu.Library, team: Team, tasks: int, grain: int) -> list[tuple[int, int]]:
    """The chunks of a region, in the order in which the caller of a team without workers runs them."""
    found = np.zeros((64, 2), np.int64)
    args = np.array([0, found.ctypes.data], np.int64)
    notes = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2)(library["notes"])
    notes(team.address, args.ctypes.data, tasks, grain)
    return [(int(begin), int(end)) for begin, end in found[: args[0]]]


@given(st.sampled_from([2, 3, 5]), st.integers(0, 10_000), st.integers(0, 200))
def test_chunks_are_even(library: cpu.Library, alone: dict[int, Team], size: int, tasks: int, grain: int) -> None:
    """They cover the tasks, differ by one at most, and there are as many for each member of the team."""
    found = sorted(ranges(library, alone[size], tasks, grain))
    assert [begin for begin, _ in found] == [0, *(end for _, end in found[:-1])]
    assert found[-1][1] == tasks
    if tasks > max(grain, 1):
        lengths = [end - begin for begin, end in found]
        assert max(lengths) - min(lengths) <= 1
        most = min(-(-tasks // max(grain, 1)), size * CHUNKS_PER_WORKER)
        assert len(found) == (most if most < size else most // size * size)


@pytest.mark.parametrize(("size", "chunks"), [(2, 8), (2, 2), (3, 12), (3, 2), (5, 3)])
def test_own_share_first(library: cpu.Library, alone: dict[int, Team], size: int, chunks: int) -> None:
    """The caller goes through its share, the first one, from the front, and takes those of others from the back."""
    found = [begin // 10 for begin, _ in ranges(library, alone[size], 10 * chunks, 10)]
    ends = [-(-chunks * member // size) for member in range(size + 1)]
    others = [list(range(ends[m], ends[m + 1]))[::-1] for m in range(1, size)]
    assert found == [*range(ends[1]), *(k for share in others for k in share)]


def test_small_regions_wake_nobody(library: cpu.Library) -> None:
    """With all workers asleep, a region is handed out only if it is worth waking one; the team's word tells."""
    team, grain = Team(2, cpu.support()), 10

    def word(offset: int) -> int:
        return ctypes.c_int64.from_address(team.address + offset).value

    def handed_out(tasks: int) -> bool:
        while word(SLEEPERS) < 1:
            time.sleep(0.001)
        before = word(WORD) >> 32
        assert (count(library, team.address, tasks, grain, 1) == 1).all()
        return word(WORD) >> 32 != before

    count(library, team.address, 100, 1, 1)  # starts the worker
    assert not handed_out(WAKING * grain)
    assert handed_out(WAKING * grain + 1)
    # The region before has told the worker to wake up. If it does so only now, it is not asleep.
    assert not all(handed_out(grain + 1) for _ in range(50))
    team.stop(10)


def test_size(team: Team) -> None:
    size = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(cpu.support()["stitch_team_size"])
    assert (size(team.address), size(None)) == (team.size, 1)


def test_hints_are_optional(library: cpu.Library, team: Team) -> None:
    begin, end = (
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(cpu.support()[f"stitch_team_{name}"]) for name in ("begin", "end")
    )
    for address in (team.address, None):
        begin(address)
        assert (count(library, address, 40, 1, 100) == 100).all()
        end(address)


def test_callers_at_the_same_time(library: cpu.Library, team: Team) -> None:
    start = threading.Barrier(4)

    def call(tasks: int) -> bool:
        start.wait()
        return bool((count(library, team.address, tasks, 1, 1500) == 1500).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, [5, 50, 37, 200]))


def test_region_inside_a_region(library: cpu.Library, team: Team) -> None:
    tasks = 20
    counts, using, clashes = np.zeros((tasks, 50), np.int64), np.zeros((tasks, 8), np.int64), np.zeros(1, np.int64)
    args = [0, 0, 0, team.address]
    for task in range(tasks):
        args += [counts[task].ctypes.data, using[task].ctypes.data, clashes.ctypes.data]
    memory = np.array(args, np.int64)
    signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    signature(library["nested"])(team.address, memory.ctypes.data, tasks)
    assert (counts == 1).all()


def test_waiting_for_a_late_worker(library: cpu.Library, team: Team) -> None:
    """The caller has nothing left to do, falls asleep, and is woken when everything is done, not before."""
    counts, using, clashes = np.zeros(9, np.int64), np.zeros(8, np.int64), np.zeros(1, np.int64)
    args = np.array([counts.ctypes.data, using.ctypes.data, clashes.ctypes.data], np.int64)
    wait = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(library["wait"])
    for turn in range(1, 101):
        wait(team.address, args.ctypes.data, counts.size)
        assert (counts == turn).all()
    assert clashes[0] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_while_others_run(library: cpu.Library) -> None:
    """A child starts workers of its own, even if a region was going on in another thread of the parent."""
    team = Team(3, cpu.support())
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            count(library, team.address, 64, 1, 20)

    neighbour = threading.Thread(target=keep_busy)
    neighbour.start()
    try:
        for _ in range(5):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    right = (count(library, team.address, 300, 1, 200) == 200).all()
                    status = 0 if right and team.workers == 2 else 2
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        neighbour.join()
    assert (count(library, team.address, 300, 1, 10) == 10).all()


PROGRAM = """
import ctypes, threading, sys
import numpy as np
sys.path[:0] = {path!r}
from test_threads import IR, count
from stitch.runtime import cpu
library = cpu.Library(cpu.compile_ir(IR), ["regions"], cpu.support())
address = cpu.team(4).address
assert (count(library, address, 300, 1, 20) == 20).all()
{more}
print("done", flush=True)
"""
ENDINGS = {
    "plain": "",
    "busy": "threading.Thread(target=lambda: count(library, address, 300, 1, 10**12), daemon=True).start()",
    "error": "print('done', flush=True); raise SystemExit(0)",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_interpreter_ends(ending: str) -> None:
    """Workers asleep, workers busy for ever, an exception: nothing hangs, crashes or complains."""
    here = Path(__file__).resolve().parent
    program = PROGRAM.format(path=[str(here), str(here.parent)], more=ENDINGS[ending])
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, "done\n", "")


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "20000 100000"}, 1),
        ({"proc/self/cgroup": "0::/lost\n", "sys/fs/cgroup/cpu.max": "100000 100000"}, 1),
        (
            {
                "proc/self/cgroup": "3:cpuset:/z\n2:cpu,cpuacct:/docker/x\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us": "100000",
                "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000",
            },
            1,
        ),
        (
            {
                "proc/self/cgroup": "2:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
    ],
)
def test_cores(tmp_path: Path, files: dict[str, str], cores: int | None) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    allowed = len(os.sched_getaffinity(0))
    assert available_cores(tmp_path) == (cores or allowed)
