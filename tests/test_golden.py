"""Schedules and loop programs as text: a change of any decision shows as a difference here.

`pytest tests/test_golden.py --update-golden` accepts what there is; read the difference before committing it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stitch import target as targets
from stitch.codegen import kernels, loop_text
from stitch.graph import Value
from stitch.stitching import schedule
from stitch.stitching.schedule import Stitched
from stitch.stitching.trace import Flow
from stitch.target import Target
from tests import hand_graphs, pipeline

FOLDER = Path(__file__).parent / "golden"
NAMES = ("softmax", "layer_norm_gelu", "two_axes", "linear_gelu", "movement_chain", "concat")
TARGETS = ("avx512", "avx2", "neon")


def programs(stitched: Stitched, target: Target) -> str:
    """The loop programs of a cut, with what each parameter is."""
    made = {n.output for k in stitched.kernels for n in k.nodes}
    flow = Flow(stitched.graph, made | set(stitched.graph.outputs))
    parts = []
    for k in stitched.kernels:
        low = kernels.lower(k, flow, target)
        given = ", ".join(p.name if isinstance(p, Value) else f"packed {p.value.name}" for p in low.parameters)
        parts.append(f"{k.name} ({given})\n{loop_text.render(low.program)}")
    return "\n".join(parts)


def compare(file: Path, text: str, update: bool) -> None:
    if update:
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert file.is_file(), f"there is no {file.name}: make it with --update-golden"
    wanted = file.read_text(encoding="utf-8")
    assert text == wanted, f"{file.name} differs; if that is meant, --update-golden"


@pytest.mark.parametrize("name", NAMES)
def test_schedule(name: str, update_golden: bool) -> None:
    compare(FOLDER / f"{name}.schedule.txt", schedule.render(pipeline.cut(hand_graphs.graph(name))), update_golden)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_programs(name: str, target: str, update_golden: bool) -> None:
    text = programs(pipeline.cut(hand_graphs.graph(name)), targets.parse(target))
    compare(FOLDER / f"{name}.{target}.txt", text, update_golden)


@pytest.mark.parametrize("name", hand_graphs.GRAPHS)
def test_texts_are_stable(name: str) -> None:
    """Twice the same graph, twice the same text, in one process; the files above compare processes."""
    first, second = (pipeline.cut(hand_graphs.graph(name)) for _ in range(2))
    assert schedule.render(first) == schedule.render(second)
    if all(k.opaque is None for k in first.kernels):
        target = targets.parse("avx2")
        assert programs(first, target) == programs(second, target)


def test_no_golden_text_is_left_over() -> None:
    known = {f"{n}.{kind}.txt" for n in NAMES for kind in ("schedule", *TARGETS)}
    ours = {f.name for f in FOLDER.glob("*.txt") if re.fullmatch(r"\w+\.(schedule|avx\w+|neon)\.txt", f.name)}
    assert ours == known
