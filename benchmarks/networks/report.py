"""What was measured: rows, their table, and what they say together."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.chains.limit import Limit
from benchmarks.pipe import OURS

TITLES = {
    "shared": "Real models",
    "light": "The networks in the onnx package, with random weights",
    "exports": "Large architectures, random weights, symbolic dims",
}


@dataclass(frozen=True)
class Timing:
    """One engine on one network: milliseconds of each round, their median over runs, and the shortest of all runs."""

    rounds: Sequence[float] = ()
    best: float = 0.0
    problem: str = ""  # why there is no time
    wrong: bool = False  # because nobody agrees with the outputs

    @property
    def good(self) -> bool:
        return not self.problem

    @property
    def ms(self) -> float:
        return statistics.median(self.rounds)


@dataclass(frozen=True)
class Row:
    """One network at one choice of its dims with one number of threads."""

    collection: str
    name: str
    dims: str
    threads: int
    limit: Limit | None = None
    timings: Mapping[str, Timing] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.name} {self.dims}".strip()

    @property
    def ours(self) -> Timing:
        return self.timings.get(OURS, Timing(problem="not measured"))

    @property
    def wrong(self) -> bool:
        """Whether stitch's outputs are not those that peers agree on."""
        return self.ours.wrong and any(t.good for t in self.timings.values())

    @property
    def peer(self) -> str:
        """The fastest of the others that have a time, or ''."""
        good = [name for name, t in self.timings.items() if name != OURS and t.good]
        return min(good, key=lambda name: self.timings[name].ms, default="")

    def ratios(self, peer: str) -> list[float]:
        """How many times as long that peer took in each round; none if one of the two has no time."""
        theirs = self.timings.get(peer, Timing(problem="not measured"))
        if not (self.ours.good and theirs.good):
            return []
        return [b / a for a, b in zip(self.ours.rounds, theirs.rounds, strict=True)]

    def ratio(self, peer: str = "") -> float | None:
        """Of the best peer, if none is named."""
        found = self.ratios(peer or self.peer)
        return statistics.median(found) if found else None

    @property
    def share(self) -> float | None:
        """The part of our time that nobody could save."""
        return 1e3 * self.limit.seconds / self.ours.ms if self.limit is not None and self.ours.good else None


# ------------------------------------------------------------------ tables


def header(engines: Sequence[str]) -> list[str]:
    """The two lines that a table begins with."""
    names = ["model", "dims", "threads", *(f"{e} ms" for e in engines)]
    names += ["best peer / stitch", "quartiles", "limit ms", "limit / stitch"]
    texts = ("model", "dims", "quartiles")
    return [f"| {' | '.join(names)} |", f"|{'|'.join('---' if n in texts else '---:' for n in names)}|"]


def line(row: Row, engines: Sequence[str]) -> str:
    found = row.ratios(row.peer)
    low, high = np.quantile(found, (0.25, 0.75)) if found else (0.0, 0.0)
    times = [row.timings[e] if e in row.timings else Timing(problem="not measured") for e in engines]
    bound = "" if row.limit is None else f" {row.limit.bound[:3]}"
    cells = [
        *(row.name, row.dims, str(row.threads), *(figure(t.ms) if t.good else "" for t in times)),
        *((f"{statistics.median(found):.2f}", f"{low:.2f} to {high:.2f}") if found else ("", "")),
        "" if row.limit is None else figure(1e3 * row.limit.seconds),
        "" if row.share is None else f"{row.share:.2f}{bound}",
    ]
    return f"| {' | '.join(cells)} |"


def table(rows: Sequence[Row], engines: Sequence[str]) -> str:
    """Markdown: the rows, and below them why there are blanks."""
    lines = [*header(engines), *(line(r, engines) for r in rows)]
    reasons = blanks(rows)
    return "\n".join([*lines, *(["", *(f"* {reason}" for reason in reasons)] if reasons else [])])


def blanks(rows: Iterable[Row]) -> list[str]:
    """Why there is no time, once for all rows of a network with the same reason."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for r in rows:
        for engine, t in r.timings.items():
            if not t.good:
                found.setdefault((r.name, engine, t.problem), []).append(f"{r.dims} {threads(r.threads)}".strip())
    return [f"{name}, {engine} ({'; '.join(at)}): {why}" for (name, engine, why), at in found.items()]


def figure(ms: float) -> str:
    return f"{ms:.4f}" if ms < 0.1 else f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


# ------------------------------------------------------------------ together


def summary(rows: Sequence[Row]) -> str:
    """For each number of threads: geometric means, where a peer is faster, and how near the limit exports come."""
    out = []
    for number in sorted({r.threads for r in rows}):
        out += _together([r for r in rows if r.threads == number], threads(number))
    return "\n\n".join(out)


def _together(rows: Sequence[Row], what: str) -> list[str]:
    ratios = {r.label: ratio for r in rows if (ratio := r.ratio()) is not None}
    compared = [r for r in rows if r.label in ratios]
    out = []
    if compared:
        means = [f"{mean(ratios.values()):.2f} over {len(compared)} rows"]
        for collection in dict.fromkeys(r.collection for r in compared):
            found = [ratios[r.label] for r in compared if r.collection == collection]
            means.append(f"{collection} {mean(found):.2f} ({len(found)})")
        best = mean(r.timings[r.peer].best / r.ours.best for r in compared)
        out.append(f"{what}: geometric mean of best peer / stitch {', '.join(means)}; of the shortest runs {best:.2f}.")
        out.append(f"Of each engine / stitch, over as many rows: {', '.join(_each(rows))}.")
        slower = sorted((label for label in ratios if ratios[label] < 1), key=lambda label: ratios[label])
        named = ", ".join(f"{label} ({ratios[label]:.2f})" for label in slower) or "none"
        out.append(f"Below 1.0 with {what}, {len(slower)} of {len(compared)}: {named}.")
    shares = {r.label: r.share for r in rows if r.share is not None and r.collection == "exports"}
    if shares:
        least, most = min(shares, key=lambda label: shares[label]), max(shares, key=lambda label: shares[label])
        out.append(
            f"Of the limit, exports reach with {what} {mean(shares.values()):.2f} (geometric mean of "
            f"{len(shares)}), from {shares[least]:.2f} ({least}) to {shares[most]:.2f} ({most})."
        )
    return out


def _each(rows: Sequence[Row]) -> list[str]:
    out = []
    for engine in dict.fromkeys(name for r in rows for name in r.timings if name != OURS):
        found = [ratio for r in rows if (ratio := r.ratio(engine)) is not None]
        if found:
            out.append(f"{engine} {mean(found):.2f} ({len(found)})")
    return out


def threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"


def mean(values: Iterable[float]) -> float:
    """Geometric."""
    return statistics.geometric_mean(values)
