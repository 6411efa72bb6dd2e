"""Bar charts of times, in the terminal and as a picture: a panel for each size, a bar for each engine.

The first engine is the one the chart is about; the others are told apart by their names, not by colours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Rows = Mapping[str, Mapping[str, float]]  # milliseconds, by size and engine

WIDTH = 44  # characters of the longest bar
EIGHTHS = " ▏▎▍▌▋▊▉"
INK, ACCENT, QUIET, PAPER = "#1f2328", "#c2410c", "#a8b0b9", "#ffffff"


def is_plain(encoding: str | None, environ: Mapping[str, str]) -> bool:
    """Whether the terminal is one for ASCII alone."""
    return environ.get("TERM") == "dumb" or "utf" not in (encoding or "").lower()


def text(title: str, rows: Rows, plain: bool = False) -> str:
    """The chart in characters. All bars are to one scale within a size."""
    names = max(len(name) for times in rows.values() for name in times)
    lines = [title, ""]
    for size, times in rows.items():
        lines.append(size)
        longest = max(times.values())
        first = next(iter(times.values()))
        for name, ms in times.items():
            bar = _bar(ms / longest if longest else 0.0, plain)
            lines.append(f"  {name:{names}}  {bar} {number(ms)} ms{_ratio(ms, first)}")
        lines.append("")
    return "\n".join(lines[:-1])


def _bar(part: float, plain: bool) -> str:
    if plain:
        return "#" * max(1, round(part * WIDTH))
    whole, rest = divmod(max(1, round(part * WIDTH * 8)), 8)
    return "█" * whole + EIGHTHS[rest].strip()


def _ratio(ms: float, first: float) -> str:
    return "" if ms == first or not first else f"  ({ms / first:.2f} times as long)"


def number(ms: float) -> str:
    """Three digits, as many as a measurement is good for."""
    digits = max(0, 2 - math.floor(math.log10(ms))) if ms > 0 else 0
    return f"{ms:.{min(digits, 4)}f}"


def picture(path: Path, title: str, rows: Rows) -> Path | None:
    """The chart as a PNG, or None where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    engines = len(next(iter(rows.values())))
    with plt.rc_context({"font.family": "sans-serif", "font.size": 10.5, "text.color": INK, "axes.labelcolor": INK}):
        high = 0.75 + len(rows) * (0.42 + 0.34 * engines)
        figure, panels = plt.subplots(len(rows), 1, figsize=(8.2, high), squeeze=False, facecolor=PAPER)
        for axes, (size, times) in zip(panels[:, 0], rows.items(), strict=True):
            _panel(axes, size, times)
        what, _, how = title.partition(", ")
        top = 1 - 0.26 / high
        figure.text(0.02, top, what, fontsize=14, fontweight="bold", va="center")
        figure.text(0.98, top, f"{how}; shorter is better", fontsize=10, va="center", ha="right", color="#57606a")
        figure.subplots_adjust(left=0.215, right=0.8, top=1 - 0.82 / high, bottom=0.16 / high, hspace=0.42)
        figure.savefig(path, dpi=160)
        plt.close(figure)
    return path


def _panel(axes: Any, size: str, times: Mapping[str, float]) -> None:
    names, values = list(times), list(times.values())
    colours = [ACCENT if k == 0 else QUIET for k in range(len(names))]
    axes.barh(range(len(names)), values, color=colours, height=0.72)
    axes.set_yticks(range(len(names)), names)
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.invert_yaxis()
    axes.set_xlim(0, max(values))
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0, pad=6)
    axes.spines[["top", "right", "bottom", "left"]].set_visible(False)
    axes.set_title(size, loc="left", fontsize=10.5, color="#57606a", pad=4)
    for k, ms in enumerate(values):
        ratio = f"  ({ms / values[0]:.2f}×)" if k and values[0] else ""
        axes.annotate(f"{number(ms)} ms{ratio}", (ms, k), xytext=(5, 0), textcoords="offset points", va="center",
                      fontweight="bold" if k == 0 else "normal", annotation_clip=False)  # fmt: skip
