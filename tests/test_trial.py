"""Nodes for a delegate because it is faster at them. The clock is made up, so that what it decides can be told."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from stitch import api, knobs, trial
from stitch.delegated import DelegatedModel, Found
from stitch.delegation import FASTER, UNSUPPORTED
from stitch.errors import InputError, MissingInput, MissingRuntime, ResourceError
from tests.test_delegation import Numpy, Odd, info, make, node, x


def chain(kinds: Sequence[str]) -> onnx.ModelProto:
    """One node after the other, called by kind and position."""
    values = ["x", *(f"v{k}" for k in range(len(kinds) - 1)), "y"]
    nodes = [node(kind, [values[k]], [values[k + 1]], name=f"{kind}{k}") for k, kind in enumerate(kinds)]
    model = make(nodes, [info("x")], [info("y")])
    model.graph.value_info.extend(info(v) for v in values[1:-1])
    return model


def costs(of: Callable[[str, str], float], border: float = 1.0) -> trial.Clock:
    """A clock by which a node takes what `of` says for it on a device, and each region `border` more."""

    def seconds(model: DelegatedModel) -> float:
        return sum(border + sum(of(device, n) for n in nodes) for device, nodes in model.division.regions)

    return lambda a, b, feeds: (seconds(a), seconds(b))


def only(kind: str, here: float = 10.0, there: float = 1.0) -> Callable[[str, str], float]:
    """The delegate is as much faster at one kind of node, and slower at all others."""
    return lambda device, n: (there if n.startswith(kind) else 2 * here) if device == "numpy" else here


def delegated(
    model: onnx.ModelProto, clock: trial.Clock, patch: pytest.MonkeyPatch, cache: bool = False, delegate: Any = None
) -> DelegatedModel:
    real = trial.tried
    patch.setattr(
        trial, "tried", lambda cutter, base, build, feeds, name: real(cutter, base, build, feeds, name, clock)
    )
    return api.delegated(model, delegate or Numpy(), cache=cache, threads=1, trial={"x": x()})


def right(made: DelegatedModel, model: onnx.ModelProto) -> None:
    wanted: Any = ReferenceEvaluator(model, new_ops=[Odd]).run(None, {"x": x(5)})
    np.testing.assert_allclose(made.run(None, {"x": x(5)})[0], wanted[0], rtol=1e-5, atol=1e-6)


def test_what_is_faster_goes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain(["Sin", "Sin", "Tanh", "Tanh", "Sin", "Sin", "Sin", "Sin"])
    made = delegated(model, costs(only("Tanh")), monkeypatch)
    assert [(d, len(n)) for d, n in made.division.regions] == [("stitch", 2), ("numpy", 2), ("stitch", 4)]
    assert {code for _, code, _ in made.division.reasons} == {FASTER}
    text = str(made.explain())
    assert "region 1 on numpy: Tanh2, Tanh3" in text
    assert "ms with it on numpy, 8.1e+04 ms without: it was measured to be faster there (faster)" in text
    assert "ms with all on stitch that it supports, handing over included" in text
    assert made.explain().to_dict()["notes"] == list(made.division.notes)
    right(made, model)


def test_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = delegated(chain(["Tanh"] * 5), costs(only("Tanh")), monkeypatch)
    assert [(d, len(n)) for d, n in made.division.regions] == [("numpy", 5)]
    assert "1 parts tried" in made.division.notes[0]


def test_handing_over_may_cost_more_than_it_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain(["Sin", "Sin", "Tanh", "Tanh", "Sin", "Sin", "Sin", "Sin"])
    made = delegated(model, costs(only("Tanh"), border=20.0), monkeypatch)
    assert [d for d, _ in made.division.regions] == ["stitch"]
    assert made.division.reasons == ()
    assert "it is faster at none" in str(made.explain())
    right(made, model)


def test_beside_what_stitch_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain(["Sin", "Odd", "Tanh", "Sin", "Sin", "Sin"])
    made = delegated(model, costs(only("Tanh")), monkeypatch)
    codes = {n: code for n, code, _ in made.division.reasons}
    assert codes == {"Odd1": UNSUPPORTED, "Tanh2": FASTER}
    assert [d for d, _ in made.division.regions] == ["stitch", "numpy", "stitch"]
    right(made, model)


def test_a_gain_that_the_last_look_does_not_confirm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that flatters whatever is new, until it is asked a second time."""
    seen: set[tuple[str, ...]] = set()

    def clock(a: DelegatedModel, b: DelegatedModel, feeds: trial.Feeds) -> tuple[float, float]:
        key = tuple(n for d, nodes in b.division.regions if d == "numpy" for n in nodes)
        again = key in seen
        seen.add(key)
        return 1.0, 1.0 if again else 0.5

    made = delegated(chain(["Tanh"] * 3), clock, monkeypatch)
    assert [d for d, _ in made.division.regions] == ["stitch"]


def test_a_delegate_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Numpy):
        def load(self, model: bytes, outputs: Sequence[str]) -> Any:
            run = super().load(model, outputs)
            return lambda feeds: [result + np.float32(0.5) for result in run(feeds)]

    model = chain(["Tanh", "Sin"])
    made = delegated(model, costs(lambda device, _: float(device != "numpy")), monkeypatch, delegate=Wrong())
    assert [d for d, _ in made.division.regions] == ["stitch"]
    assert "3 of which it could not do, or did otherwise" in str(made.explain())
    right(made, model)


def test_a_delegate_that_does_not_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(Numpy):
        def load(self, model: bytes, outputs: Sequence[str]) -> Any:
            raise ResourceError("numpy", "not this")

    made = delegated(chain(["Tanh", "Sin"]), costs(only("Tanh")), monkeypatch, delegate=Picky())
    assert [d for d, _ in made.division.regions] == ["stitch"]


def test_what_was_found_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = chain(["Sin", "Tanh"])
    with knobs.using(cache_dir=tmp_path, cache_bytes=1 << 30):
        first = delegated(model, costs(only("Tanh")), monkeypatch, cache=True)
        assert [d for d, _ in first.division.regions] == ["stitch", "numpy"]
        monkeypatch.setattr(trial, "tried", None)
        again = api.delegated(model, Numpy(), threads=1, trial={"x": x() + 1})
        assert again.division == first.division
        with pytest.raises(TypeError):  # other shapes: to be tried anew
            api.delegated(model, Numpy(), threads=1, trial={"x": x(9)})
        plain = api.delegated(model, Numpy(), threads=1)
    assert [d for d, _ in plain.division.regions] == ["stitch"]


def test_findings_survive_as_text() -> None:
    found = Found({"a": "2 ms"}, ("b",))
    assert Found.of_json(found.to_json()) == found


def test_trials_of_a_model_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = Numpy()
    made = delegated(chain(["Tanh"] * 40), lambda a, b, feeds: (1.0, 1.0), monkeypatch, delegate=numpy)
    assert [d for d, _ in made.division.regions] == ["stitch"]
    assert len(numpy.parts) <= trial.MOST
    assert "15 parts tried" in made.division.notes[0]


def test_the_real_clock() -> None:
    """Whichever is faster: the results are right, and what is said is what was done."""
    model = chain(["Sin", "Tanh", "Sin"])
    made = api.delegated(model, Numpy(), cache=False, threads=1, trial={"x": x()})
    right(made, model)
    assert made.division.notes
    assert any(code == FASTER for _, code, _ in made.division.reasons) == (
        {d for d, _ in made.division.regions} != {"stitch"}
    )


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from(["Sin", "Sigmoid", "Tanh", "Odd"]), min_size=1, max_size=7).filter(
        lambda kinds: kinds.count("Odd") <= 2  # each triples errors
    ),
    st.dictionaries(
        st.sampled_from(["Sin", "Sigmoid", "Tanh", "Odd"]), st.tuples(st.integers(1, 9), st.integers(1, 9))
    ),
    st.integers(0, 5),
)
def test_never_slower_and_always_right(kinds: list[str], speeds: Mapping[str, tuple[int, int]], border: int) -> None:
    def of(device: str, name: str) -> float:
        here, there = speeds.get(name.rstrip("0123456789"), (1, 1))
        return float(there if device == "numpy" else here)

    model, clock = chain(kinds), costs(of, float(border))
    base = api.delegated(model, Numpy(), cache=False, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        made = delegated(model, clock, patch)
    before, after = clock(base, made, {})
    assert after <= before
    assert made.division.regions == base.division.regions or after <= (1 - trial.GAIN) * before
    right(made, model)


# ------------------------------------------------------------------ what is wrong


def test_wrong_trials() -> None:
    model = chain(["Tanh"])
    with pytest.raises(MissingInput):
        api.delegated(model, Numpy(), cache=False, trial={})
    with pytest.raises(InputError):
        api.delegated(model, Numpy(), cache=False, trial={"x": x()[0]})
    for given_devices in (None, ["cpu"], ["null"]):
        with pytest.raises(ValueError, match="a trial"):
            api.optimize(model, devices=given_devices, trial={"x": x()})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one input at a time"):
        api.optimize(model, devices=["cpu", "onnxruntime"], objective="throughput", trial={"x": x()})


def test_a_trial_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingRuntime, match="onnxruntime is not installed; install it with"):
        api.optimize(chain(["Tanh"]), devices=["cpu", "onnxruntime"], trial={"x": x()}, cache=False)


def test_a_trial_with_onnxruntime() -> None:
    pytest.importorskip("onnxruntime")
    model = chain(["Tanh", "Sin"])
    made = api.optimize(model, devices=["cpu", "onnxruntime"], trial={"x": x()}, cache=False)
    assert isinstance(made, DelegatedModel)
    assert "tried on onnxruntime" in str(made.explain())
    right(made, model)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ([1.0, 100.0], [1.5, 100.0], True),
        ([1.0, 100.0], [3.0, 100.0], False),
        ([np.nan, np.inf], [np.nan, np.inf], True),
        ([np.nan, 1.0], [1.0, 1.0], False),
        ([1.0, 1.0], [1.0, np.inf], False),
        ([], [], True),
    ],
)
def test_close(a: list[float], b: list[float], same: bool) -> None:
    assert trial.close([np.array(a, np.float32)], [np.array(b, np.float32)]) is same


def test_close_is_of_one_type_and_shape() -> None:
    one = np.ones(2, np.float32)
    assert not trial.close([one], [one.astype(np.float64)])
    assert not trial.close([one], [one[:1]])
    assert not trial.close([np.array([1, 2])], [np.array([1, 3])])
    assert trial.close([np.array([1, 2])], [np.array([1, 2])])
