"""Messages are part of the interface: each is written out here once."""

import pickle

import pytest

from stitch import errors
from stitch.errors import StitchError

MESSAGES: list[tuple[StitchError, str]] = [
    (
        errors.UnsupportedOperator("LSTM", node="lstm_1", opset=14),
        "operator LSTM (ai.onnx, opset 14) of node 'lstm_1' is not supported; "
        "run that part with another runtime, or rewrite it with supported operators",
    ),
    (
        errors.UnsupportedOperator("Add", domain="com.ex", opset=1, dtype="string", advice="use floats"),
        "operator Add (com.ex, opset 1) of a node without a name is not supported for string; use floats",
    ),
    (
        errors.InvalidModel("Concat needs at least one input", node="cat", advice=""),
        "node 'cat': Concat needs at least one input",
    ),
    (
        errors.InvalidModel("the graph has a cycle"),
        "the graph has a cycle; check the model with onnx.checker.check_model(model, full_check=True)",
    ),
    (
        errors.MissingInput("mask", inputs=["x", "mask"]),
        "input 'mask' is missing; the model's inputs are 'x', 'mask'",
    ),
    (
        errors.UnknownInput("input_id", inputs=["input_ids", "mask"]),
        "the model has no input 'input_id'; did you mean 'input_ids'?",
    ),
    (errors.UnknownInput("z", inputs=[]), "the model has no input 'z'; the model's inputs are none"),
    (
        errors.WrongDtype("x", given="float64", expected="float32"),
        "input 'x' has dtype float64, but the model says float32; convert it with .astype('float32')",
    ),
    (
        errors.WrongRank("x", given=(7,), expected=("batch", 128)),
        "input 'x' has rank 1, shape (7,), but the model says rank 2, shape (batch, 128)",
    ),
    (errors.WrongShape("x", axis=1, given=7, expected=8), "axis 1 of input 'x' is 7, but the model says 8"),
    (
        errors.SymbolConflict("y", axis=0, symbol="batch", given=3, other_input="x", other_axis=0, other=2),
        "axis 0 of input 'y' makes batch = 3, but axis 0 of input 'x' makes it 2; "
        "both axes are called batch in the model and must have the same length",
    ),
    (
        errors.ConstraintViolated("seq % 8 == 0", values={"seq": 7}, reason="node 'reshape'"),
        "the inputs' shapes must satisfy seq % 8 == 0 (needed by node 'reshape'), but seq = 7",
    ),
    (errors.UnknownKnob("thread", knobs=["threads"]), "there is no knob thread; did you mean 'threads'?"),
    (
        errors.InvalidKnob("debug", given="loud", expected="a whole number, 0 to 4"),
        "knob debug is 'loud', but must be a whole number, 0 to 4",
    ),
    (
        errors.UnknownDevice("gpu", available=["cpu", "cpu:0-1"], reason="did you mean 'cpu'?"),
        "there is no device 'gpu': did you mean 'cpu'?; there are 'cpu', 'cpu:0-1'",
    ),
    (
        errors.EmptyDevice("cpu:", available="0-3"),
        "the device 'cpu:' has no CPU; name some of the CPUs 0-3, as in 'cpu:0-3'",
    ),
    (
        errors.OverlappingDevices("cpu:0-1", "cpu:1", cpus="1", available="0-3"),
        "the devices 'cpu:0-1' and 'cpu:1' share the CPUs 1; give each of the CPUs 0-3 to one device only",
    ),
    (
        errors.UnavailableCpus("cpu:9", cpus="9", available="0-3", excluded=False),
        "the CPUs 9 of the device 'cpu:9' do not exist; there are 0-3",
    ),
    (
        errors.InvalidBoard("board.toml", "clusters[0].hertz", "it is missing", "say what was measured"),
        "the board 'board.toml' is wrong: clusters[0].hertz: it is missing; say what was measured",
    ),
    (
        errors.NoDevice("k3", devices=["cpu:0", "cpu:1"]),
        "'k3' can run on none of the devices 'cpu:0', 'cpu:1'; add a device that can, such as 'onnxruntime'",
    ),
    (
        errors.MemoryLimit(limits={"cpu:0": 50, "null": float("inf")}, smallest={"cpu:0": 107}, exact=True),
        "no placement fits into the bytes 50 for 'cpu:0'; the smallest bytes that do are 107 for 'cpu:0'",
    ),
    (
        errors.MemoryLimit(limits={"cpu:0": 50}, smallest={"cpu:0": 107}, exact=False),
        "no placement fits into the bytes 50 for 'cpu:0'; this is known to do: 107 for 'cpu:0'",
    ),
    (
        errors.StreamError(3, stage="stage 1", reason=ValueError("no frame")),
        "input 3 of the stream failed in stage 1: no frame",
    ),
    (errors.StreamError(0, stage=None, reason=KeyError()), "input 0 of the stream failed: KeyError"),
    (
        errors.ResourceError("memory", "could not allocate 3 GiB for the arena", "use a smaller batch"),
        "could not allocate 3 GiB for the arena; use a smaller batch",
    ),
    (
        errors.MissingRuntime("onnxruntime", "onnxruntime is not installed", "install it"),
        "onnxruntime is not installed; install it",
    ),
]


@pytest.mark.parametrize(("error", "message"), MESSAGES, ids=lambda value: type(value).__name__)
def test_message(error: StitchError, message: str) -> None:
    assert str(error) == message


@pytest.mark.parametrize(("error", "message"), MESSAGES, ids=lambda value: type(value).__name__)
def test_survives_pickling(error: StitchError, message: str) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == message
    assert vars(copy) == vars(error)


def test_every_error_has_a_message_above() -> None:
    def leaves(kind: type[StitchError]) -> set[type[StitchError]]:
        below = kind.__subclasses__()
        return set().union(*map(leaves, below)) if below else {kind}

    raised = leaves(StitchError) | {errors.ResourceError}  # which has a kind of its own below, and is raised itself
    assert raised == {type(error) for error, _ in MESSAGES}


def test_attributes() -> None:
    error = errors.UnsupportedOperator("LSTM", node="lstm_1", opset=14)
    assert (error.operator, error.node, error.domain, error.opset, error.dtype) == (
        "LSTM",
        "lstm_1",
        "ai.onnx",
        14,
        None,
    )
    assert error.advice.startswith("run that part")
    assert errors.WrongShape("x", axis=1, given=7, expected=128).input == "x"


def test_mistakes_of_the_caller_are_value_errors() -> None:
    assert issubclass(errors.InputError, ValueError)
    assert issubclass(errors.KnobError, ValueError)
