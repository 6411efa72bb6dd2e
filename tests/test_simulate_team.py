"""Kernels that the clusters of a described board share."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from stitch import boardfile, dtypes
from stitch.dims import symbol
from stitch.graph import Builder, Graph
from stitch.placement import latency, sharing
from stitch.simulate.model import problem_of
from stitch.simulate.team import team_of
from stitch.simulate.work import rates_of, seconds
from stitch.stitching.stitch import stitch
from stitch.topology import Board

KIRIN = boardfile.load("kirin970")


def layers() -> Graph:
    """Two products with an exponential behind each."""
    b = Builder("layers")
    x = b.input("x", dtypes.FLOAT32, (symbol("n"), 512))
    for _ in range(2):
        w = b.const(np.ones((512, 512), np.float32))
        x = b.unary("exp", b.contract(x, w, (0, 2), (2, 1), (0, 1)))
    return b.finish({"y": x})


def placed(board: Board, n: int) -> tuple[float, float, list[tuple[int, ...]]]:
    """Seconds with help and without, and the pieces of each kernel."""
    stitched = stitch(layers(), 1 << 18)
    loaded = problem_of(stitched, board, {"n": n})
    team = team_of(stitched, loaded, board, {"n": n})
    names = [k.name for k in stitched.kernels]
    helped = sharing.help_out(loaded.problem, team.lead, [team.saved(name) for name in names])
    return latency.place(helped).seconds, latency.place(loaded.problem).seconds, [p.pieces for p in team.phases(names)]


@pytest.mark.parametrize("name", ["kirin970", "raspberry_pi5", "x86_hybrid"])
@pytest.mark.parametrize("n", [1, 64, 4096])
def test_help_never_takes_longer(name: str, n: int) -> None:
    helped, alone, _ = placed(boardfile.load(name), n)
    assert helped <= alone * (1 + 1e-9)


def test_large_kernels_are_shared_and_small_ones_are_not() -> None:
    helped, alone, pieces = placed(KIRIN, 8192)
    assert helped < 0.9 * alone
    assert all(a > b > 0 for a, b in pieces), "the A53 get less"
    helped, alone, pieces = placed(KIRIN, 1)
    assert helped == alone
    assert all(b == 0 for _, b in pieces)


def test_a_slow_link_makes_it_dearer() -> None:
    slow = replace(KIRIN, links=tuple(replace(link, bandwidth=5e7) for link in KIRIN.links))
    assert placed(slow, 8192)[0] > placed(KIRIN, 8192)[0]


def test_what_is_divided() -> None:
    """All but beginning and ending a kernel: on one core of four, the rest takes four times as long."""
    stitched = stitch(layers(), 1 << 18)
    loaded = problem_of(stitched, KIRIN, {"n": 64})
    (of, _), *_ = team_of(stitched, loaded, KIRIN, {"n": 64}).kernels[stitched.kernels[0].name]
    rates = [rates_of(c) for c in KIRIN.clusters]
    assert of.alone == tuple(seconds(loaded.work[0], r, 4) for r in rates)
    for one, r in zip(of.core, rates, strict=True):
        whole = seconds(replace(loaded.work[0], kernels=0), r, 4)
        assert math.isclose(one, 4 * whole)
    assert of.fixed == max(r.kernel for r in rates)
