"""Operators shared by devices: the pieces against all that there are, the leader, and what a placement makes of it."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stitch.placement import latency, sharing
from stitch.placement.problem import Device, Item, Link, Problem, assignment_seconds
from stitch.placement.sharing import PIECES, Divisible, share
from tests.placements import assignments, problems

TWO = [Device("big"), Device("little")]
Links = list[list[Link]]


def seconds_of(
    of: Divisible, devices: list[Device], links: list[list[Link]], lead: int, pieces: tuple[int, ...]
) -> float:
    """What these pieces take, by the definition: the last device to be done, after what sharing costs."""
    count = sum(pieces)
    times = []
    for d, (device, n) in enumerate(zip(devices, pieces, strict=True)):
        if n:
            read = of.bytes * (n / count if of.way == "rows" else 1.0)
            sent = links[lead][d].seconds(read) + links[d][lead].seconds(0) if d != lead else 0.0
            times.append(of.core[d] * math.ceil(n / device.cores) / count + sent)
    return of.fixed + max(times)


@st.composite
def operators(draw: st.DrawFn) -> tuple[Divisible, list[Device], Links, int]:
    count = draw(st.integers(1, 3))
    devices = [Device(f"d{d}", draw(st.integers(1, 2))) for d in range(count)]
    core = tuple(float(draw(st.integers(1, 60))) for _ in devices)
    alone = tuple(c / d.cores + draw(st.integers(0, 4)) for c, d in zip(core, devices, strict=True))
    bandwidth = st.sampled_from([4.0, math.inf])
    links = [
        [Link() if a == b else Link(float(draw(st.integers(0, 3))), draw(bandwidth)) for b in devices] for a in devices
    ]
    of = Divisible(
        draw(st.integers(0, 12)), alone, core, float(draw(st.integers(0, 4))), draw(st.integers(0, 40)),
        draw(st.sampled_from(["rows", "columns"])),
    )  # fmt: skip
    return of, devices, links, draw(st.integers(0, count - 1))


@given(operators())
def test_no_pieces_are_better(given_operator: tuple[Divisible, list[Device], Links, int]) -> None:
    """But for the leader's part, which is never nothing, and a gain too small to count."""
    of, devices, links, lead = given_operator
    found = share(of, devices, links, lead)
    assert found.pieces[lead] > 0
    if found.shared:
        assert found.seconds == pytest.approx(seconds_of(of, devices, links, lead, found.pieces))
        assert found.seconds < of.alone[lead]
        assert sum(found.pieces) <= of.pieces
    else:
        assert found.seconds == of.alone[lead]
    for limit in PIECES:
        count = min(of.pieces, limit * sum(d.cores for d in devices))
        rows = [p for p in product(range(count + 1), repeat=len(devices)) if sum(p) == count > 1]
        times = {p: seconds_of(of, devices, links, lead, p) for p in rows if sum(n > 0 for n in p) > 1}
        whole = [seconds_of(of, devices, links, lead, p) for p in rows if p not in times]
        best = min(times.values(), default=math.inf)
        if best < min(whole, default=math.inf) and all(p[lead] for p, seconds in times.items() if seconds == best):
            assert found.seconds * (1 - sharing.GAIN) ** 2 <= best + 1e-9


def test_shares_follow_speed() -> None:
    assert share(Divisible(80, (1.0, 1.0), (1.0, 1.0)), TWO, (), 0).pieces == (4, 4)
    slow = share(Divisible(80, (1.0, 2.5), (1.0, 2.5)), TWO, (), 0)
    assert slow.pieces == (6, 2)
    assert slow.seconds == 0.75


def test_finer_pieces_only_where_they_gain() -> None:
    assert sum(share(Divisible(80, (1.0, 3.0), (1.0, 3.0)), TWO, (), 0).pieces) == 8
    assert share(Divisible(80, (1.0, 2.0), (1.0, 2.0)), TWO, (), 0).pieces == (11, 5)


@pytest.mark.parametrize(
    "of",
    [
        Divisible(1, (1.0, 1.0), (1.0, 1.0)),
        Divisible(80, (1.0, 1.0), (1.0, 1.0), fixed=0.6),
        Divisible(80, (1.0, 50.0), (1.0, 50.0)),
    ],
    ids=["one piece", "handing out is dear", "the other is too slow"],
)
def test_what_is_not_worth_sharing(of: Divisible) -> None:
    found = share(of, TWO, (), 0)
    assert not found.shared
    assert (found.pieces, found.seconds) == ((1, 0), 1.0)


def test_few_pieces_stay_with_the_cores_that_are_fast() -> None:
    """Four pieces for four fast cores and four slow ones: a slow one would be the last."""
    devices = [Device("big", 4), Device("little", 4)]
    assert not share(Divisible(4, (0.25, 0.5), (1.0, 2.0)), devices, (), 0).shared
    assert share(Divisible(32, (0.25, 0.5), (1.0, 2.0)), devices, (), 0).pieces == (24, 8)


def test_who_is_stopped_keeps_the_others_waiting() -> None:
    """With half of its time, a core is no slower core: it computes as fast, then nothing for a while."""
    mostly = share(Divisible(80, (1.0, 1 / 0.9), (1.0, 1.0), given=(1.0, 0.9)), TWO, (), 0)
    assert mostly.pieces == (4, 4)
    assert mostly.seconds == pytest.approx(0.5 / 0.9)
    assert not share(Divisible(80, (1.0, 2.0), (1.0, 1.0), given=(1.0, 0.5)), TWO, (), 0).shared
    both = share(Divisible(80, (1 / 0.9, 1 / 0.9), (1.0, 1.0), given=(0.9, 0.9)), TWO, (), 0)
    assert both.seconds == pytest.approx(0.5 / 0.81)
    three = [*TWO, Device("third")]
    some = share(Divisible(80, (1.0, 2.5, 1.0), (1.0, 1.0, 1.0), given=(1.0, 0.4, 1.0)), three, (), 0)
    assert (some.pieces, some.seconds) == ((4, 0, 4), 0.5)


def test_what_another_cache_reads_is_sent() -> None:
    links = [[Link(), Link(0.0, 100.0)], [Link(0.0, 100.0), Link()]]
    rows = Divisible(80, (1.0, 1.0), (1.0, 1.0), bytes=60)
    assert share(rows, TWO, (), 0).pieces == (4, 4)
    apart = share(rows, TWO, links, 0)
    assert apart.pieces[0] > apart.pieces[1] > 0
    columns = Divisible(80, (1.0, 1.0), (1.0, 1.0), bytes=60, way="columns")
    assert share(columns, TWO, links, 0).seconds > apart.seconds, "all of the input, not a part"


def test_the_leader_is_the_fastest_of_the_first() -> None:
    assert sharing.leader([]) == 0
    items = [Item("a", ((1.0,), (2.0,))), Item("b", ((3.0,), (1.0,)))]
    assert sharing.leader(items) == 1
    assert sharing.leader([Item("a", ((1.0,), (1.0,)))]) == 0


@given(problems(items=5, inf=False), st.data())
def test_latency_with_help_is_the_best_of_all(problem: Problem, data: st.DataObject) -> None:
    lead = sharing.leader(problem.items)
    saved = [data.draw(st.integers(0, 40)) / 8 for _ in problem.items]
    helped = sharing.help_out(problem, lead, saved)
    for item, before, less in zip(helped.items, problem.items, saved, strict=True):
        assert item.seconds[lead][-1] == max(before.seconds[lead][-1] - less, 0.0)
        assert [t for d, t in enumerate(item.seconds) if d != lead] == [
            t for d, t in enumerate(before.seconds) if d != lead
        ]
    best = min(assignment_seconds(helped, a) for a in assignments(helped))
    assert latency.place(helped).seconds == pytest.approx(best)
