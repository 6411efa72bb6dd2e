"""The command `stitch`."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from benchmarks import architectures
from stitch import cli, cli_stream, knobs
from stitch.runtime import affinity

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("cli") / "block.onnx"
    onnx.save(architectures.encoder("block", layers=1, width=32, heads=2, vocabulary=50, positions=32), path)
    return str(path)


def test_explain(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", model, "--size", "batch=2", "--size", "seq=7"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("at batch=2, seq=7\n")
    assert "LayerNormalization" in shown
    assert cli.main(["explain", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["symbols"] == ["batch", "seq"]
    assert cli.main(["explain", model, "--kernel", "k0"]) == 0
    assert capsys.readouterr().out.startswith("kernel k0: ")


def test_compile_fills_the_cache(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with knobs.using(cache_dir=tmp_path):
        assert cli.main(["compile", model]) == 0
    assert f"loaded from {tmp_path} in " in capsys.readouterr().out
    assert list(tmp_path.rglob("*.artifact"))
    assert cli.main(["compile", model, "--no-cache", "--target", "avx2"]) == 0
    shown = capsys.readouterr().out
    assert "loaded from" not in shown
    assert "/256/" in shown


def test_run(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", model, "--size", "seq=5", "--runs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "in   input_ids: int64[1, 5]"
    assert lines[2].startswith("out  last_hidden_state: float32[1, 5, 32]  from ")
    assert lines[3].endswith("the median of 2")


def test_simulate(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "out.svg"
    assert cli.main(["simulate", model, "--size", "seq=7", "--inputs", "20", "--svg", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert " kernels on HiSilicon Kirin 970" in lines[0]
    assert lines[1].split()[0] == "4xa73"
    assert any(line.endswith("the slowest") for line in lines)
    assert lines[-1] == f"picture: {picture}"
    assert picture.read_text().startswith("<svg ")
    for board in ("raspberry_pi5", "x86_hybrid"):
        assert cli.main(["simulate", model, "--board", board, "--objective", "latency"]) == 0
        assert "(no placement takes less)" in capsys.readouterr().out
    large = ["--size", "batch=64", "--size", "seq=128"]
    assert cli.main(["simulate", model, "--board", "x86_hybrid", "--objective", "latency", *large]) == 0
    told = capsys.readouterr().out
    assert "of them shared by clusters" in told
    assert "ms; alone p " in told


def test_show(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for stage, begin in (("graph", "graph block\n"), ("schedule", "kernel k0: "), ("loops", "k0:\nprogram kernel(")):
        assert cli.main(["show", model, stage, "--target", "avx2"]) == 0
        assert capsys.readouterr().out.startswith(begin)


def test_operators(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["operators"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Where  9" in lines
    assert lines[-2].startswith(f"{len(lines) - 2} operators")


def test_knobs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["knobs"]) == 0
    assert capsys.readouterr().out.strip() == knobs.describe()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["explain", "nowhere.onnx"], "nowhere.onnx"),
        (["explain", "pyproject.toml"], "is not an ONNX file"),
        (["explain", "MODEL", "--size", "sequence=3"], "no symbol 'sequence'; its symbols are 'batch', 'seq'"),
        (["explain", "MODEL", "--kernel", "k99"], "no kernel 'k99'"),
        (["run", "MODEL", "--size", "sequence=3"], "no symbol 'sequence'"),
        (["run", "MODEL", "--size", "seq=99999999999999"], "no memory for input"),
        (["simulate", "MODEL", "--size", "sequence=3"], "no symbol 'sequence'; its symbols are batch, seq"),
        (["simulate", "MODEL", "--board", "kirin"], "there is no device 'kirin'"),
        (["simulate", "MODEL", "--board", "nowhere.toml"], "nowhere.toml"),
        (["stream", "MODEL", "--devices", "cpu:4711"], "the CPUs 4711 of the device 'cpu:4711' do not exist"),
        (["stream", "MODEL", "--devices", "cpu:0-99999999999"], "there is no CPU 99999999999"),
        (["stream", "MODEL", "--devices", "gpu:0"], "there is no device 'gpu:0'"),
        (["simulate", "MODEL", "--objective", "latency", "--svg", "x.svg"], "a picture shows the stages"),
        (["stream", "MODEL", "--devices", "cpu", "--devices", "cpu"], "the devices 'cpu' and 'cpu' share the CPUs"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str],
    complaint: str,
    model: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main([model if a == "MODEL" else a for a in arguments]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("stitch: ")
    assert complaint in shown.err
    assert shown.err.count("\n") == 1


def test_stream(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first = sorted(affinity.allowed())[0]
    with knobs.using(cache_dir=tmp_path):
        for devices in ([], ["--devices", f"cpu:{first}"], ["--devices", f"cpu:{first}-{first}"]):
            assert cli.main(["stream", model, "--items", "7", "--size", "seq=3", *devices]) == 0
            shown = capsys.readouterr()
            assert "7 results, the first after " in shown.out
            assert (f"stage 0  cpu:{first} " in shown.out) == bool(devices)
            assert shown.err == ""  # not a terminal


def test_progress_is_one_line_of_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out, clock = Terminal(), iter(range(100))
    assert list(cli_stream.progress(iter("abc"), 3, out, lambda: float(next(clock)))) == ["a", "b", "c"]
    text = out.getvalue()
    assert text.count("\r") == 4
    assert "\r3/3" in text
    assert text.endswith("\r\033[K")
    assert "\n" not in text
    plain = io.StringIO()
    assert list(cli_stream.progress(iter("ab"), 2, plain)) == ["a", "b"]
    assert plain.getvalue() == ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "required: COMMAND"),
        (["run", "m", "--size", "batch"], "'batch' is not like batch=2"),
        (["compile", "m", "--target", "nothing"], "there is no target 'nothing'"),
        (["simulate", "m", "--queue", "0"], "'0' is not a number above zero"),
        (["simulate", "m", "--jitter", "much"], "'much' is not a number from 0 to 10"),
        (["run", "m", "--runs", "0"], "'0' is not a number from 1 on"),
        (["stream", "m", "--items", "0"], "'0' is not a number from 1 on"),
        (["stream", "m", "--items", "²"], "'²' is not a number from 1 on"),
    ],
)
def test_wrong_usage(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_as_a_module_and_into_a_closed_pipe() -> None:
    found = subprocess.run(
        f"{sys.executable} -m stitch operators | head -1",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == "Abs  1\n"
    assert found.stderr == ""
