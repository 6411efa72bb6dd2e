"""Who works on what when, as a picture: a row for each stage and link, a box for each input.

`svg` is a text that any browser shows; `text` is for a terminal. Both are the same for the same trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from stitch.simulate.events import Run, Span

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#9c6b4e", "#97bbf5")
LABEL, WIDTH, ROW, GAP, TOP = 150, 760, 26, 8, 34  # of the picture, in pixels
LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
SHORTEST = 14  # pixels of a box that has room for its number


def svg(run: Run, names: Sequence[str], title: str, until: float | None = None) -> str:
    """The picture of the first `until` seconds (None: all), with a name for each stage."""
    end = min(until or run.seconds, run.seconds) or 1.0
    rows = _rows(run, names)
    height = TOP + len(rows) * (ROW + GAP) + 28
    scale = WIDTH / end
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LABEL + WIDTH + 20}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="18" font-weight="bold">{escape(title)}</text>',
    ]
    for k, (name, spans) in enumerate(rows):
        y = TOP + k * (ROW + GAP)
        lines.append(f'<text x="8" y="{y + 17}">{escape(name)}</text>')
        lines.append(f'<rect x="{LABEL}" y="{y}" width="{WIDTH}" height="{ROW}" fill="#f0f0f0"/>')
        for span in spans:
            if span.begin < end:
                lines += _box(span, y, scale, end)
    bottom = TOP + len(rows) * (ROW + GAP)
    for tick in range(6):
        x = LABEL + WIDTH * tick / 5
        lines.append(f'<path d="M{x:.1f} {TOP - 4}V{bottom}" stroke="#999" stroke-dasharray="2 3"/>')
        lines.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{_seconds(end * tick / 5)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _box(span: Span, y: int, scale: float, end: float) -> list[str]:
    x = LABEL + span.begin * scale
    width = (min(span.end, end) - span.begin) * scale
    box = (
        f'<rect x="{x:.1f}" y="{y + 2}" width="{max(width - 0.5, 0.5):.1f}" height="{ROW - 4}" '
        f'fill="{COLOURS[span.item % len(COLOURS)]}"><title>input {span.item}: {_seconds(span.begin)} to '
        f"{_seconds(span.end)}</title></rect>"
    )
    if width < SHORTEST:
        return [box]
    return [box, f'<text x="{x + width / 2:.1f}" y="{y + 17}" text-anchor="middle" fill="white">{span.item}</text>']


def text(run: Run, names: Sequence[str], until: float | None = None, columns: int = 72) -> str:
    """A row of characters for each stage: the last digit of the input that it works on longest, or a dot."""
    end = min(until or run.seconds, run.seconds) or 1.0
    rows = _rows(run, names)
    longest = max((len(name) for name, _ in rows), default=0)
    lines = []
    for name, spans in rows:
        longest_in, letters = [0.0] * columns, ["."] * columns
        for span in spans:
            first, last = int(span.begin / end * columns), int(span.end / end * columns)
            for c in range(first, min(last, columns - 1) + 1):
                left, right = end * c / columns, end * (c + 1) / columns
                share = min(span.end, right) - max(span.begin, left)
                if share > longest_in[c] and share >= (right - left) / 2:
                    longest_in[c], letters[c] = share, LETTERS[span.item % len(LETTERS)]
        lines.append(f"{name:{longest}} {''.join(letters)}")
    lines.append(f"{'':{longest}} {'0':<{columns - 8}}{_seconds(end):>8}")
    return "\n".join(lines) + "\n"


def _rows(run: Run, names: Sequence[str]) -> list[tuple[str, list[Span]]]:
    """Stages in order, each followed by the link behind it if that takes any time."""
    rows = []
    for s in range(run.stages):
        rows.append((names[s], [x for x in run.spans if not x.link and x.resource == s]))
        carried = [x for x in run.spans if x.link and x.resource == s]
        if carried:
            rows.append(("  link", carried))
    return rows


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1 or unit == "us":
            return f"{value * scale:.3g} {unit}" if value else "0"
    return "0"
