"""The simulated pipeline against closed forms, a recurrence that knows no events, and what must hold of any run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stitch.simulate import gantt
from stitch.simulate.events import Run, run

TIMES = st.integers(0, 8).map(float)


def recurrence(times: Sequence[float], links: Sequence[float], items: int, queue: int) -> list[list[float]]:
    """When each stage begins with each input, from what it must wait for."""
    stages = len(times)
    begin = [[0.0] * items for _ in range(stages)]
    leave = [[0.0] * items for _ in range(stages)]
    arrive = [[0.0] * items for _ in range(stages)]
    for k in range(items):
        for s in range(stages):
            before = leave[s][k - 1] if k else 0.0
            if s:
                at = leave[s - 1][k]
                arrive[s][k] = max(at, arrive[s][k - 1] if k else 0.0) + links[s - 1]
            begin[s][k] = max(before, arrive[s][k])
            leave[s][k] = begin[s][k] + times[s]
            if s + 1 < stages and k >= queue:  # room appears when the next stage takes the value `queue` before
                leave[s][k] = max(leave[s][k], begin[s + 1][k - queue])
    return begin


@given(st.lists(TIMES, min_size=1, max_size=5), st.data(), st.integers(0, 12), st.integers(1, 3))
def test_events_are_what_the_recurrence_says(times: list[float], data: st.DataObject, items: int, queue: int) -> None:
    links = [data.draw(TIMES) for _ in times[1:]]
    found = run(times, items, queue=queue, links=links)
    wanted = recurrence(times, links, items, queue)
    for span in found.spans:
        if not span.link:
            assert span.begin == wanted[span.resource][span.item]
            assert span.end - span.begin == times[span.resource]


@given(
    st.lists(st.floats(0.001, 5), min_size=1, max_size=4), st.integers(1, 30), st.integers(1, 4),
    st.floats(0, 1), st.integers(0, 9), st.data(),
)  # fmt: skip
def test_what_holds_of_any_run(
    times: list[float], items: int, queue: int, jitter: float, seed: int, data: st.DataObject
) -> None:
    between = len(times) - 1
    links = data.draw(st.one_of(st.just([]), st.lists(st.floats(0, 5), min_size=between, max_size=between)))
    found = run(times, items, queue=queue, links=links, jitter=jitter, seed=seed)
    assert found == run(times, items, queue=queue, links=links, jitter=jitter, seed=seed)
    assert len(found.released) == len(found.started) == items  # nothing is lost, nothing is made
    assert list(found.released) == sorted(found.released)
    assert all(0 <= full <= queue for full in found.fullest)
    assert all(0 <= busy <= 1 + 1e-9 for busy in found.utilisation())
    for s in range(len(times)):
        own = [x for x in found.spans if x.resource == s and not x.link]
        assert [x.item for x in own] == list(range(items))  # in order
        assert all(a.end <= b.begin for a, b in pairwise(own))  # one at a time
    assert waiting(found) <= queue


def waiting(found: Run) -> int:
    """The largest number of inputs that one stage has done and the next has not taken, without the one it holds."""
    most = 0
    for s in range(found.stages - 1):
        begin = {x.item: x.begin for x in found.spans if x.resource == s + 1 and not x.link}
        done = sorted((x.end, x.item) for x in found.spans if x.resource == s and not x.link)
        for _, item in done:  # when the stage begins with the next one, this one is in the queue
            nexts = [x.begin for x in found.spans if x.resource == s and x.item == item + 1 and not x.link]
            if nexts:
                most = max(most, sum(1 for j in range(item + 1) if begin[j] > nexts[0]))
    return most


@pytest.mark.parametrize(("first", "second"), [(3.0, 2.0), (2.0, 3.0), (2.0, 2.0)])
def test_two_stages(first: float, second: float) -> None:
    found = run([first, second], 10)
    slower = max(first, second)
    assert found.seconds == first + second + 9 * slower
    assert found.throughput == pytest.approx(1 / slower)
    busy = found.utilisation()
    assert busy == pytest.approx((10 * first / found.seconds, 10 * second / found.seconds))


def test_a_full_queue_holds_up_the_stage_before_it() -> None:
    """The first stage is ahead by the queue, the input that it holds, and the one that the next stage works on."""
    found = run([1.0, 10.0], 20, queue=3)
    assert found.fullest == (3,)
    assert found.latency == pytest.approx(sum(b - a for a, b in zip(found.started, found.released, strict=True)) / 20)
    assert found.released[-1] - found.started[-1] == 5 * 10.0


def test_links_are_stages_of_their_own() -> None:
    found = run([1.0, 1.0], 10, links=[4.0], queue=4)
    assert found.throughput == pytest.approx(1 / 4)
    assert found.seconds == 1 + 10 * 4 + 1


def test_jitter_lowers_throughput() -> None:
    smooth = run([1.0, 1.0, 1.0], 400, queue=1)
    rough = run([1.0, 1.0, 1.0], 400, queue=1, jitter=0.5, seed=1)
    assert smooth.throughput == pytest.approx(1.0)
    assert rough.throughput < 0.9
    assert run([1.0, 1.0, 1.0], 400, queue=1, jitter=0.5, seed=2) != rough


def test_nothing_to_do() -> None:
    found = run([1.0], 0)
    assert (found.seconds, found.latency, found.utilisation()) == (0.0, 0.0, (0.0,))
    assert run([2.0], 1).throughput == 0.5
    assert run([0.0], 5).throughput == math.inf


@pytest.mark.parametrize(
    ("stages", "settings"),
    [
        ([], {}),
        ([1.0], {"links": [1.0]}),
        ([1.0], {"queue": 0}),
        ([-1.0], {}),
        ([math.inf], {}),
        ([1.0], {"jitter": -1}),
    ],
)
def test_wrong_pipelines(stages: list[float], settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"a pipeline has|times are finite"):
        run(stages, 3, **settings)  # type: ignore[arg-type]


# ------------------------------------------------------------------ pictures


def test_plain_text() -> None:
    found = run([1.0, 2.0], 3)
    assert gantt.text(found, ["big", "little"], columns=14) == (
        "big    001122........\n"
        "little ..000011112222\n"
        "       0          7 s\n"
    )  # fmt: skip


def test_svg_is_xml_with_a_box_for_each_span() -> None:
    found = run([1e-3, 2e-3], 4, links=[1e-3])
    text = gantt.svg(found, ["4xA73 <fast>", "4xA53 & slow"], "two & two")
    root = ElementTree.fromstring(text)
    boxes = root.findall(".//{*}title")
    assert len(boxes) == len(found.spans) == 12
    labels = [t.text for t in root.findall(".//{*}text")]
    assert {"4xA73 <fast>", "4xA53 & slow", "two & two", "  link", "0"} <= set(labels)
    assert len(gantt.svg(found, ["a", "b"], "", until=2e-3)) < len(text)
