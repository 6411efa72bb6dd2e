"""`stitch stream`: a model on a stream of random inputs, in one stage or in one on each set of CPUs."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import numpy as np

from stitch.model import RunnableModel

_SHOWN_S = 0.1  # how often the counter is written


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """The command's own arguments; those that others have too are not among them."""
    parser = commands.add_parser("stream", help="run on a stream of random inputs, in stages on several sets of CPUs")
    parser.add_argument("--items", type=positive, default=100, metavar="N", help="how many inputs (default 100)")
    parser.add_argument("--depth", type=positive, default=2, metavar="N", help="items in flight per stage (default 2)")
    parser.add_argument(
        "--devices", action="append", default=[], metavar="DEVICE",
        help="a set of CPUs, as cpu:0 or cpu:0,2-3, or another device; once for each; none: one team on all CPUs",
    )  # fmt: skip
    return parser


def stream(model: RunnableModel, feed: dict[str, np.ndarray], items: int, depth: int) -> None:
    """Runs a model on the same input again and again, and prints how long that took."""
    feeds = (feed for _ in range(items))
    start = first = time.perf_counter()
    with model.stream(feeds, depth=depth, reuse=True) as results:
        for k, _ in enumerate(progress(results, items)):
            first = time.perf_counter() if k == 0 else first
    end = time.perf_counter()
    rate = f", then {(items - 1) / (end - first):.4g} a second" if items > 1 else ""
    print(f"{items} results, the first after {1e3 * (first - start):.3g} ms{rate}")


def progress(
    results: Iterator[object], total: int, out: TextIO | None = None, now: Callable[[], float] = time.monotonic
) -> Iterator[object]:
    """The results, counted on one line of a terminal; on nothing, if stderr is none."""
    out = out or sys.stderr
    if not out.isatty():
        yield from results
        return
    start = shown = now()
    count = 0
    try:
        for count, result in enumerate(results, 1):
            yield result
            if now() - shown >= _SHOWN_S or count == total:
                shown = now()
                out.write(f"\r{count}/{total}  {count / max(shown - start, 1e-9):.4g}/s ")
                out.flush()
    finally:
        if count:
            out.write("\r\033[K")
            out.flush()


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)
