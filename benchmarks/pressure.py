"""One chain with as many threads as cores, when the cores are not ours alone.

    python -m benchmarks.pressure [--peers PYTHON] [--seconds N] [--record]

Residual, layer norm and GELU over 1024x768, called again and again, each engine in a process of its own, in turns:

quiet   nothing else is running;
beside  on each core one process that never rests: half of each core is left;
quota   stitch in a control group that may use half a core, or one: the team as it comes and a team of two, beside one
        thread that stays on one core.
"""

from __future__ import annotations

import argparse
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.chains.engines import ENGINES
from benchmarks.chains.worker import CASE, Worker, prepare, settle
from benchmarks.pipe import Failed, default_peers, processors

CHAIN, SIZE = "layernorm_gelu", "l3"
OURS, PEERS = "stitch", ("onnxruntime", "openvino", "torch")
ROUNDS = 4  # turns that an engine has in each situation
QUOTAS = (0.5, 1.0)  # cores
PERIOD_US = 100_000
BESIDE_AIM, QUOTA_AIM = 2.4, 1.2
GROUPS = Path("/sys/fs/cgroup")
SPIN = """
import os
os.sched_setaffinity(0, {{{core}}})
while os.getppid() == {parent}:
    for _ in range(1_000_000):
        pass
"""


@dataclass(frozen=True)
class Times:
    """Milliseconds of a call."""

    mean: float
    median: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        taken = 1e3 * np.asarray(seconds)
        return cls(float(taken.mean()), float(np.median(taken)), float(np.quantile(taken, 0.99)))


# ------------------------------------------------------------------ processes


class Caller(Worker):
    """A worker that tells how long every single call took. No threads: as many as the engine thinks right."""

    def __init__(self, engine: str, threads: int, python: str, caches: Path) -> None:
        super().__init__(engine, threads, python, caches)
        self.threads = threads

    def _start(self) -> None:
        self._command = [*self._command[:2], "benchmarks.pressure", "serve", *self._command[-2:]]
        super()._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def load(self) -> None:
        self.threads = self.ask("load")

    def close(self) -> None:
        self._process.kill()
        super().close()


def serve(engine: str, threads: int) -> None:
    """The other end: answers commands from stdin on stdout, until there are no more."""
    if threads:
        os.sched_setaffinity(0, processors(threads))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    run = None
    while True:
        try:
            command, *rest = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Any
            if command == "load":
                answer = threads or _default()
                session = ENGINES[engine][0](prepare(CASE[CHAIN], CASE[CHAIN].sizes[SIZE], answer))
                settle(session)
                run = session.run
            else:
                assert run is not None
                answer = []
                now, end = time.perf_counter(), time.perf_counter() + rest[0]
                while now < end:
                    start = now
                    run()
                    now = time.perf_counter()
                    answer.append(now - start)
            good = True
        except Exception as problem:
            good, answer = False, f"{type(problem).__name__}: {problem}"
        pickle.dump((good, answer), answers)
        answers.flush()


def _default() -> int:
    from stitch.runtime.threads import available_cores

    return available_cores()


@contextmanager
def neighbours() -> Iterator[None]:
    """One process on each core that never rests; it ends with us, however we end."""
    with ExitStack() as stack:
        for core in sorted(os.sched_getaffinity(0)):
            program = SPIN.format(core=core, parent=os.getpid())
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", program]))
            stack.callback(process.kill)
        time.sleep(0.3)
        yield


@contextmanager
def group(cores: float, name: str) -> Iterator[Path]:
    """A control group with a quota of so many cores. OSError where none can be made."""
    folder = _group(cores, f"stitch-{os.getpid()}-{name}")
    try:
        yield folder
    finally:
        for _ in range(100):  # until the system has forgotten those who were in it
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.02)


def _group(cores: float, name: str) -> Path:
    quota = round(cores * PERIOD_US)
    forms = {
        "cpu": {"cpu.cfs_period_us": f"{PERIOD_US}", "cpu.cfs_quota_us": f"{quota}"},
        "cpu,cpuacct": {"cpu.cfs_period_us": f"{PERIOD_US}", "cpu.cfs_quota_us": f"{quota}"},
        ".": {"cpu.max": f"{quota} {PERIOD_US}"},
        "unified": {"cpu.max": f"{quota} {PERIOD_US}"},
    }
    inside = {line.split(":", 2)[2].lstrip("/") for line in Path("/proc/self/cgroup").read_text().splitlines()}
    for mount, files in forms.items():
        for path in sorted(inside, key=len):
            folder = GROUPS / mount / path / name
            if not (folder.parent / "cgroup.procs").exists():
                continue
            try:
                folder.mkdir()
            except OSError:
                continue
            try:
                for file, text in files.items():
                    with (folder / file).open("r+") as there:
                        there.write(text)
                return folder
            except OSError:
                folder.rmdir()
    raise OSError("no control group with a quota can be made here")


# ------------------------------------------------------------------ measuring


def measure(callers: Sequence[Caller], seconds: float) -> list[Times]:
    """All of them in turns."""
    taken: list[list[float]] = [[] for _ in callers]
    for _ in range(ROUNDS):
        for caller, times in zip(callers, taken, strict=True):
            times += caller.ask("time", seconds / ROUNDS)
    return [Times.of(times) for times in taken]


def shared(peers: str, caches: Path, seconds: float) -> tuple[dict[str, tuple[Times, Times]], list[str]]:
    """By engine: quiet, and beside busy processes. And why some are missing."""
    cores = len(os.sched_getaffinity(0))
    missing, ready = [], []
    with ExitStack() as stack:
        for engine in (OURS, *PEERS):
            caller = Caller(engine, cores, sys.executable if engine == OURS else peers, caches)
            stack.callback(caller.close)
            try:
                caller.load()
                ready.append(caller)
            except Failed as problem:
                missing.append(f"no {engine}: {problem}")
        quiet = measure(ready, seconds)
        with neighbours():
            beside = measure(ready, seconds)
    return {c.engine: pair for c, *pair in zip(ready, quiet, beside, strict=True)}, missing  # type: ignore[misc]


def throttled(cores: float, caches: Path, seconds: float) -> dict[str, Times]:
    """stitch under a quota: the default team, two threads, one thread."""
    with ExitStack() as stack:
        callers = []
        for threads in (0, 2, 1):
            folder = stack.enter_context(group(cores, str(threads)))
            caller = Caller(OURS, threads, sys.executable, caches)
            stack.callback(caller.close)
            (folder / "cgroup.procs").write_text(str(caller.pid))
            caller.load()
            callers.append(caller)
        names = [f"default: {callers[0].threads}", "2", "1"]
        return dict(zip(names, measure(callers, seconds), strict=True))


# ------------------------------------------------------------------ the table


def told(engines: Mapping[str, tuple[Times, Times]]) -> tuple[list[str], dict[str, bool]]:
    lines = ["| ms a call | quiet: mean | median | p99 | beside: mean | median | p99 | mean ÷ quiet |"]
    lines.append("|---|" + "---:|" * 7)
    for engine, (quiet, beside) in engines.items():
        cells = [f"{x:.3f}" for t in (quiet, beside) for x in (t.mean, t.median, t.p99)]
        lines.append(f"| {engine} | {' | '.join(cells)} | {beside.mean / quiet.mean:.2f} |")
    quiet, beside = engines[OURS]
    best = min((pair[1].p99 for engine, pair in engines.items() if engine != OURS), default=np.inf)
    return lines, {
        f"beside busy processes at most {BESIDE_AIM} × the quiet mean": beside.mean <= BESIDE_AIM * quiet.mean,
        "and a p99 no worse than the best peer's": beside.p99 <= best,
    }


def told_quota(cores: float, found: Mapping[str, Times]) -> tuple[list[str], dict[str, bool]]:
    single = found["1"].mean
    lines = [
        f"| {cores:g} | {threads} | {t.mean:.3f} | {t.median:.3f} | {t.p99:.3f} | {t.mean / single:.2f} |"
        for threads, t in found.items()
    ]
    most = max(t.mean for t in found.values())
    return lines, {f"a quota of {cores:g}: at most {QUOTA_AIM} × one thread": most <= QUOTA_AIM * single}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=default_peers(), metavar="PYTHON", help="default .venv-bench/bin/python")
    parser.add_argument("--seconds", type=float, default=4, metavar="N", help="of each engine in each situation")
    parser.add_argument("--record", action="store_true", help="put the tables into benchmarks/RESULTS.md")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing of ours stays behind
    with tempfile.TemporaryDirectory() as folder:
        caches = Path(folder)
        engines, missing = shared(args.peers, caches, args.seconds)
        if OURS not in engines:
            sys.exit("\n".join(missing))
        lines, met = told(engines)
        lines += ["", "| quota, cores | threads | mean | median | p99 | mean ÷ one thread |", "|---|---|" + "---:|" * 4]
        try:
            for cores in QUOTAS:
                more, aims = told_quota(cores, throttled(cores, caches, args.seconds))
                lines += more
                met |= aims
        except (OSError, Failed) as problem:
            missing.append(f"no quota: {problem}")
    lines += ["", *(f"{reason[:100]}\n" for reason in missing)]
    aims_told = "; ".join(f"{aim}: {'met' if good else 'MISSED'}" for aim, good in met.items())
    text = "\n".join([*lines, f"Aims: {aims_told}."])
    print(text)
    if args.record:
        results.record("pressure", "Threads under pressure", f"{results.origin()}\n\n{text}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        sys.exit(main())
