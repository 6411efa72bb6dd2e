"""What was measured: rows, their table, what they say together, and a picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.chains.case import SIZES
from benchmarks.chart import ACCENT, INK, QUIET

OURS = "stitch"
AIM = 1.1  # best peer / stitch
NEAR = {"memory": 0.85, "compute": 0.7}  # limit / stitch that is aimed at in dram


@dataclass(frozen=True)
class Timing:
    """One engine on one case. Microseconds: median over rounds of the medians within them, quartiles, shortest."""

    us: float = 0.0
    low: float = 0.0
    high: float = 0.0
    best: float = 0.0
    load_ms: float = 0.0  # from the model to a session, compilation included
    reload_ms: float = 0.0  # the same again, from the engine's cache on disk
    problem: str = ""  # why there is no time

    @property
    def good(self) -> bool:
        return not self.problem


@dataclass(frozen=True)
class Row:
    """One case in one size with one number of threads."""

    case: str
    size: str
    threads: int
    bytes: int
    limit_us: float
    bound: str
    timings: Mapping[str, Timing] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int]:
        return self.case, self.size, self.threads

    @property
    def ours(self) -> Timing:
        return self.timings.get(OURS, Timing(problem="not measured"))

    @property
    def peer(self) -> str:
        """The fastest of the others that are right, or ''."""
        good = [name for name, t in self.timings.items() if name != OURS and t.good]
        return min(good, key=lambda name: self.timings[name].us, default="")

    @property
    def ratio(self) -> float | None:
        """How many times as long the best peer takes."""
        return self.timings[self.peer].us / self.ours.us if self.peer and self.ours.good else None

    @property
    def near(self) -> float | None:
        """The part of our time that nobody could save."""
        return self.limit_us / self.ours.us if self.ours.good else None


# ------------------------------------------------------------------ tables

COLUMNS = ("case", "size", "stitch us", "limit us", "limit / stitch", "best peer", "its us", "peer / stitch",
           "compile ms", "cached ms")  # fmt: skip
WIDTHS = (28, 5, 9, 9, 14, 17, 9, 13, 10, 9)
TEXTS = (0, 1, 5)  # columns that are no numbers


def cells(row: Row) -> list[str]:
    ours, ratio, near = row.ours, row.ratio, row.near
    if not ours.good:
        return [row.case, row.size, "", figure(row.limit_us), "", ours.problem, "", "", "", ""]
    return [
        *(row.case, row.size, figure(ours.us), figure(row.limit_us)),
        f"{near:.2f} {row.bound[:3]}",
        *((row.peer, figure(row.timings[row.peer].us), f"{ratio:.2f}") if row.peer else ("none", "", "")),
        *(f"{ours.load_ms:.0f}", f"{ours.reload_ms:.1f}"),
    ]


def line(values: Sequence[str]) -> str:
    """For the terminal."""
    columns = zip(values, WIDTHS, strict=True)
    return "  ".join(f"{v:{w}}" if k in TEXTS else f"{v:>{w}}" for k, (v, w) in enumerate(columns)).rstrip()


def table(rows: Iterable[Row]) -> str:
    """Markdown."""
    rule = "|".join("---" if k in TEXTS else "---:" for k in range(len(COLUMNS)))
    return "\n".join([f"| {' | '.join(COLUMNS)} |", f"|{rule}|", *(f"| {' | '.join(cells(r))} |" for r in rows)])


def figure(us: float) -> str:
    return f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 1000 else f"{us:.0f}"


# ------------------------------------------------------------------ together


def summary(rows: Sequence[Row]) -> str:
    """Means, and what misses the aims, for each number of threads; then what the second thread is worth."""
    paragraphs = []
    for threads in sorted({r.threads for r in rows}):
        paragraphs += [f"With {threads} thread{'s' if threads > 1 else ''}:", *_together(_of(rows, threads))]
    if speedups := _speedups(rows):
        paragraphs.append(speedups)
    return "\n\n".join(paragraphs)


def _of(rows: Sequence[Row], threads: int) -> list[Row]:
    return [r for r in rows if r.threads == threads]


def _together(rows: Sequence[Row]) -> list[str]:
    ratios = {r.key: r.ratio for r in rows if r.ratio is not None}
    compared = [r for r in rows if r.key in ratios]
    out = []
    if compared:
        means = [f"{mean(ratios.values()):.2f} over {len(ratios)} rows"]
        for size in dict.fromkeys(r.size for r in compared):
            means.append(f"{size} {mean(ratios[r.key] for r in compared if r.size == size):.2f}")
        out.append(f"Geometric mean of best peer / stitch: {', '.join(means)}.")
    each = []
    for engine in dict.fromkeys(name for r in rows for name in r.timings if name != OURS):
        found = [r.timings[engine].us / r.ours.us for r in rows if engine in r.timings and _both(r, engine)]
        if found:
            each.append(f"{engine} {mean(found):.2f} ({len(found)})")
    if each:
        out.append(f"Of each engine / stitch, over as many rows: {', '.join(each)}.")
    below = sorted((r for r in compared if ratios[r.key] < AIM), key=lambda r: ratios[r.key])
    out.append(f"Below {AIM} of the best peer: {_named(below, ratios)}.")
    nears = {r.key: r.near for r in rows if r.near is not None}
    for bound, aim in NEAR.items():
        far = [r for r in rows if r.size == "dram" and r.bound == bound and r.key in nears and nears[r.key] < aim]
        far.sort(key=lambda r: nears[r.key])
        out.append(f"In dram, bound by {bound}, below {aim} of the limit: {_named(far, nears)}.")
    if broken := [f"{r.case} {r.size} ({r.ours.problem})" for r in rows if not r.ours.good]:
        out.append(f"Not done by stitch: {', '.join(broken)}.")
    return out


def _both(row: Row, engine: str) -> bool:
    return row.ours.good and row.timings[engine].good


def _named(rows: Sequence[Row], values: Mapping[Any, float]) -> str:
    return ", ".join(f"{r.case} {r.size} ({values[r.key]:.2f})" for r in rows) or "none"


def _speedups(rows: Sequence[Row]) -> str:
    times = {r.key: r.ours.us for r in rows if r.ours.good}
    found = {}
    for r in rows:
        if r.threads == 2 and r.key in times and (r.case, r.size, 1) in times:
            found[r.key] = times[r.case, r.size, 1] / times[r.key]
    if not found:
        return ""
    parts = []
    for size in dict.fromkeys(r.size for r in rows):
        gains = {key: gain for key, gain in found.items() if key[1] == size}
        if gains:
            worst = min(gains, key=lambda key: gains[key])
            parts.append(f"{size} {mean(gains.values()):.2f} (least {gains[worst]:.2f}, {worst[0]})")
    return f"stitch with two threads is faster than with one by: {', '.join(parts)}."


def mean(values: Iterable[float]) -> float:
    """Geometric."""
    return math.exp(statistics.fmean(map(math.log, values)))


# ------------------------------------------------------------------ kept


def save(path: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Everything, in one file that is replaced as a whole, so that an interrupted run leaves the last good one."""
    text = json.dumps({"machine": results.machine(), **about, "rows": [asdict(r) for r in rows]}, indent=1)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def load(path: Path) -> list[Row]:
    found = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [Row(**{**r, "timings": {name: Timing(**t) for name, t in r["timings"].items()}}) for r in found]


def picture(path: Path, rows: Sequence[Row]) -> None:
    """Time over limit: a panel for each size and number of threads, a row for each case, a dot for each engine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = sorted({(r.threads, r.size) for r in rows}, key=lambda p: (p[0], SIZES.index(p[1])))
    cases = list(dict.fromkeys(r.case for r in rows))[::-1]
    engines = [n for n in dict.fromkeys(name for r in rows for name in r.timings) if n != OURS]
    marks = dict(zip(engines, "ov^sDxP*<>", strict=False))
    high = 1.6 + 0.22 * len(cases)
    figure, axes = plt.subplots(1, len(panels), figsize=(2.4 + 3.4 * len(panels), high), sharey=True, squeeze=False)
    for ax, (threads, size) in zip(axes[0], panels, strict=True):
        for engine in [*engines, OURS]:
            points = [
                (r.timings[engine].us / r.limit_us, cases.index(r.case))
                for r in rows
                if (r.threads, r.size) == (threads, size) and engine in r.timings and r.timings[engine].good
            ]
            ours = engine == OURS
            if points:
                ax.plot(
                    *zip(*points, strict=True), "o" if ours else marks.get(engine, "."), ms=7 if ours else 4,
                    color=ACCENT if ours else QUIET, label=engine, mec=INK if ours else QUIET, mew=0.5,
                )  # fmt: skip
        ax.set_xscale("log")
        ax.axvline(1, color=INK, lw=0.8)
        ax.set_title(f"{size}, {threads} thread{'s' if threads > 1 else ''}", fontsize=10)
        ax.set_xlabel("time / limit")
        ax.grid(axis="y", lw=0.3)
    axes[0][0].set_yticks(range(len(cases)), cases, fontsize=8)
    handles = {label: h for ax in axes[0] for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncols=len(handles), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / high))
    figure.savefig(path, dpi=110)
    plt.close(figure)
