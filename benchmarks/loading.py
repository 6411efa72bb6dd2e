"""How long it takes from a model file to something that can run, and how much memory that takes.

    python -m benchmarks.loading [--model PATH] [--rounds N] [--engines NAME,...] [--peers PYTHON] [--record]
    python -m benchmarks.loading --models [NAME ...] [...]      # a table of many; no names: all exports in float32

Every figure is one of a fresh process: with an empty cache, and with the cache that the one before has filled, where an
engine has one (OpenVINO's is switched on for this); the file is in the page cache. The time is taken from the process's
start until the model is there, interpreter included, and for the engine's call by itself; beside it the process's
processor time, in which neighbours hardly show. The first run comes after that, and may have to do what loading put
off. The peak is that of the resident memory (VmHWM) after that run, mapped files included.

In stitch's second process it is checked that the compiler was not imported. With --model, the stages of a cold start
follow, from one more process, under a profiler.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import models, results
from benchmarks.networks.cases import Feed, image, networks
from benchmarks.networks.engines import ENGINES
from benchmarks.networks.report import figure
from benchmarks.networks.start import PARTS, PROFILE
from benchmarks.pipe import OURS, ROOT, default_peers, interpreter

COLD_S, SECOND_S = 5.0, 0.7  # what we want for distilbert
CACHED = ("stitch", "openvino")  # engines whose second process is not like their first
FRESH_S = 3  # stitch does not trust the times of a file that was written just now

# ------------------------------------------------------------------ from outside


@dataclass(frozen=True)
class Kind:
    """A way to start: an engine, and whether its cache has been filled."""

    engine: str
    second: bool = False

    def __str__(self) -> str:
        if self.engine not in CACHED:
            return f"{self.engine}, no cache"
        return f"{self.engine}, {'second process' if self.second else 'empty cache'}"


@dataclass(frozen=True)
class Subject:
    """A model with a feed, which lies in a file."""

    name: str
    path: Path
    feed: Path


Starts = Mapping[Kind, Sequence[Mapping[str, Any]]]


def kinds(engines: Iterable[str]) -> list[Kind]:
    """In the order in which they are to start: the second process after the one that fills the cache."""
    return [Kind(e, second) for e in engines for second in ((False, True) if e in CACHED else (False,))]


class Refused(Exception):
    """Why a process has nothing to say."""


def start(engine: str, subject: Subject, cache: Path, peers: str) -> dict[str, Any]:
    """What a fresh process says, and how long it took until the model was there."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("STITCH_")}
    environ |= {"STITCH_CACHE_DIR": str(cache / "stitch"), "PYTHONPYCACHEPREFIX": str(cache.parent / "bytecode")}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    python = interpreter(OURS if engine == PROFILE else engine, peers)
    command = [python, "-m", "benchmarks.networks.start", engine, *map(str, (subject.path, subject.feed, cache))]
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(f"the process ended with {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "refused" in answer:
        raise Refused(answer["refused"])
    if "loaded" in answer:
        answer["wall"] = answer["loaded"] - begin  # one clock for all processes, see CLOCK_MONOTONIC
    return answer


def measure(
    subject: Subject, engines: Sequence[str], rounds: int, peers: str
) -> tuple[dict[Kind, list[dict[str, Any]]], dict[str, str]]:
    """All starts by kind, taking turns, and the engines that refuse."""
    refused: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="stitch-bench-") as name:
        folder = Path(name)
        for engine in engines:  # bytecode and the page cache, once for everybody
            try:
                start(engine, subject, folder / "first", peers)
            except Refused as problem:
                refused[engine] = str(problem)
        shutil.rmtree(folder / "first", ignore_errors=True)
        found: dict[Kind, list[dict[str, Any]]] = {k: [] for k in kinds(engines) if k.engine not in refused}
        for number in range(rounds):
            cache = folder / str(number)
            for kind, starts in found.items():
                starts.append(start(kind.engine, subject, cache, peers))
            shutil.rmtree(cache, ignore_errors=True)
    return found, refused


def stages(subject: Subject) -> dict[str, float]:
    """The seconds of each stage of a cold start of stitch."""
    with tempfile.TemporaryDirectory(prefix="stitch-bench-") as folder:
        parts = start(PROFILE, subject, Path(folder) / "profile", sys.executable)
    return {label: parts[label] for label, _, _ in PARTS if label in parts}


# ------------------------------------------------------------------ telling

HEADER = """\
| model | start | loaded, s: best (median) | its processor time, s | imports, s | call, s: best (median) | first run, ms | peak, MB |
|---|---|---:|---:|---:|---:|---:|---:|"""  # noqa: E501


def lines(name: str, found: Starts) -> list[str]:
    """Rows of a table in Markdown."""
    out = []
    for kind, starts in found.items():
        wall, processor, imports, call = ([s[key] for s in starts] for key in ("wall", "processor", "import", "call"))
        first = [1e3 * s["first"] for s in starts if "first" in s]
        out.append(
            f"| {name} | {kind} | {min(wall):.2f} ({statistics.median(wall):.2f}) | {min(processor):.2f} "
            f"| {min(imports):.2f} | {min(call):.2f} ({statistics.median(call):.2f}) "
            f"| {figure(min(first)) if first else ''} | {statistics.median(s['peak'] for s in starts) / 1e6:.0f} |"
        )
    return out


def blanks(name: str, found: Starts, refused: Mapping[str, str]) -> list[str]:
    """Why there is no row, or no first run."""
    out = [f"{name}, {engine}: {why}" for engine, why in refused.items()]
    return out + [
        f"{name}, {kind}, first run: {starts[0]['not_run']}" for kind, starts in found.items() if "not_run" in starts[0]
    ]


def aims(found: Starts) -> str:
    """Of stitch."""
    cold, second = (min(s["wall"] for s in found[Kind(OURS, k)]) for k in (False, True))
    loaded = sorted({module for s in found[Kind(OURS, True)] for module in s["modules"]})
    return (
        f"Aims, for the shortest start, since neighbours only add: cold below {COLD_S:g} s: "
        f"{'met' if cold < COLD_S else 'MISSED'}; second process below {SECOND_S:g} s: "
        f"{'met' if second < SECOND_S else 'MISSED'}; no compiler in the second process: "
        f"{'met' if not loaded else 'MISSED, it imports ' + ', '.join(loaded)}."
    )


def stage_table(parts: Mapping[str, float]) -> str:
    out = [
        "A cold start by stages, under cProfile, which slows Python code down about twofold. Packing the weights and "
        "LLVM run side by side.",
        "",
        "| stage | s |",
        "|---|---:|",
        *(f"| {label} | {parts[label]:.2f} |" for label, _, _ in PARTS if label in parts),
    ]
    return "\n".join(out)


def summary(all_found: Sequence[Starts]) -> str:
    """Geometric means over the models that stitch and a peer have loaded: its times and memory over stitch's."""
    out = []
    everything = dict.fromkeys(kind for found in all_found for kind in found)
    for kind in [k for k in everything if k.engine != OURS]:
        ours = Kind(OURS, kind.second or kind.engine not in CACHED)  # who keeps nothing is held against the second
        both = [found for found in all_found if kind in found and ours in found]
        if both:
            times = [min(s["wall"] for s in f[kind]) / min(s["wall"] for s in f[ours]) for f in both]
            peaks = [statistics.median(s["peak"] for s in f[kind]) for f in both]
            peaks = [p / statistics.median(s["peak"] for s in f[ours]) for p, f in zip(peaks, both, strict=True)]
            out.append(
                f"{kind} / {ours} over {len(both)} models: time until loaded {statistics.geometric_mean(times):.2f}, "
                f"peak memory {statistics.geometric_mean(peaks):.2f}."
            )
    return "\n\n".join(out)


# ------------------------------------------------------------------ the command


def _distilbert(folder: Path) -> Path:
    """The exported one, or else one that is built here and now, in the folder."""
    found = models.exports()
    if found is not None and (found / "distilbert.onnx").exists():
        return found / "distilbert.onnx"
    import onnx

    from benchmarks import architectures

    path = folder / "distilbert.onnx"
    onnx.save(architectures.MODELS["distilbert"](), str(path))
    time.sleep(FRESH_S)
    return path


def _feed(path: Path) -> Feed:
    """By the description beside an export, or noise, open dims being 1."""
    described = path.with_suffix(".json")
    if not described.exists():
        return image(path)
    spec = json.loads(described.read_text())
    return models.make_feed(spec, spec["dims"])


def _subject(name: str, path: Path, feed: Feed, folder: Path) -> Subject:
    file = folder / "feed"
    file.write_bytes(pickle.dumps(feed))
    return Subject(name, path, file)


def _one(args: argparse.Namespace, folder: Path) -> str:
    path = args.model.resolve() if args.model else _distilbert(folder)
    subject = _subject(path.stem, path, _feed(path), folder)
    found, refused = measure(subject, args.engines, args.rounds, args.peers)
    paragraphs = ["\n".join([HEADER, *lines(subject.name, found)]), *blanks(subject.name, found, refused)]
    if Kind(OURS) in found:
        paragraphs += [aims(found), stage_table(stages(subject))]
    print("\n\n".join(paragraphs))
    return "\n\n".join([f"`{path.name}` has {path.stat().st_size / 1e6:.0f} MB.", *paragraphs])


def _many(args: argparse.Namespace, folder: Path) -> str:
    wanted = args.models or [name for collection, name in models.names() if collection == "exports"]
    print(HEADER)
    rows, reasons, all_found = [HEADER], [], []
    for network in networks(wanted, folder):
        if folder in network.path.parents:
            time.sleep(FRESH_S)
        subject = _subject(network.name, network.path, network.feed, folder)
        found, refused = measure(subject, args.engines, args.rounds, args.peers)
        rows += lines(subject.name, found)
        reasons += blanks(subject.name, found, refused)
        all_found.append(found)
        print("\n".join([*lines(subject.name, found), *blanks(subject.name, found, refused)]), flush=True)
    told_together = summary(all_found)
    print(f"\n{told_together}")
    return "\n\n".join([told_together, "\n".join(rows), *(f"* {reason}" for reason in reasons)])


def _list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an ONNX file (default: distilbert, exported or built)")
    parser.add_argument("--models", nargs="*", metavar="NAME", help="many, by the names that benchmarks.latency knows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", type=_list, default=list(ENGINES), help=f"default {','.join(ENGINES)}")
    parser.add_argument("--peers", default=default_peers(), metavar="PYTHON", help="default .venv-bench/bin/python")
    parser.add_argument("--record", action="store_true", help="put the tables into benchmarks/RESULTS.md")
    args = parser.parse_args()
    for name in {*args.engines} - {*ENGINES}:
        parser.error(f"no engine {name}: there are {', '.join(ENGINES)}")
    with tempfile.TemporaryDirectory(prefix="stitch-bench-") as folder:
        text = _one(args, Path(folder)) if args.models is None else _many(args, Path(folder))
    if args.record:
        section, title = (
            ("loading", "From a file to a model")
            if args.models is None
            else ("loading_models", "From a file to a model, by model")
        )
        results.record(section, title, f"{results.origin()}\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
