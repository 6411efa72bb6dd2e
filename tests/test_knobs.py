import threading
from pathlib import Path

import pytest

from stitch import knobs
from stitch.errors import InvalidKnob, UnknownKnob
from stitch.knobs import Knobs, current, from_environment, using


def test_defaults() -> None:
    assert Knobs().schemes == ("independent", "local", "regional", "global")
    assert Knobs().cache_bytes == 4 * 1024**3
    assert Knobs().debug == 0
    assert Knobs().l2_bytes is None
    assert from_environment({"PATH": "/bin"}) == Knobs()


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("STITCH_SCHEMES", "global, local", ("local", "global")),
        ("STITCH_CACHE_DIR", "/tmp/here", Path("/tmp/here")),
        ("STITCH_CACHE_BYTES", "0", 0),
        ("STITCH_CACHE_BYTES", "2GiB", 2 << 30),
        ("STITCH_DEBUG", "4", 4),
        ("STITCH_THREADS", "3", 3),
        ("STITCH_TARGET", " x86-64 ", "x86-64"),
        ("STITCH_L2_BYTES", "32KiB", 32768),
        ("STITCH_L2_BYTES", "1048576", 1 << 20),
        ("STITCH_VECTOR_BITS", "512", 512),
        ("STITCH_THREADS", "", None),
    ],
)
def test_environment(variable: str, text: str, value: object) -> None:
    name = variable.removeprefix("STITCH_").lower()
    assert getattr(from_environment({variable: text}), name) == value


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("STITCH_SCHEMES", "local,locale"),
        ("STITCH_SCHEMES", ","),
        ("STITCH_CACHE_BYTES", "4 GB"),
        ("STITCH_CACHE_BYTES", "-1"),
        ("STITCH_DEBUG", "5"),
        ("STITCH_DEBUG", "yes"),
        ("STITCH_THREADS", "0"),
        ("STITCH_THREADS", "1.5"),
        ("STITCH_L2_BYTES", "0"),
        ("STITCH_VECTOR_BITS", "384"),
    ],
)
def test_environment_is_checked(variable: str, text: str) -> None:
    with pytest.raises(InvalidKnob) as caught:
        from_environment({variable: text})
    assert str(caught.value) == f"knob {variable} is {text!r}, but must be {caught.value.expected}"


def test_unknown_variable() -> None:
    with pytest.raises(UnknownKnob, match="there is no knob STITCH_THREAD; did you mean 'STITCH_THREADS'"):
        from_environment({"STITCH_THREAD": "1"})


@pytest.mark.parametrize(
    ("environ", "directory"),
    [
        ({"HOME": "/home/ada"}, Path("/home/ada/.cache/stitch")),
        ({"HOME": "/home/ada", "XDG_CACHE_HOME": "/cache"}, Path("/cache/stitch")),
        ({"HOME": "/home/ada", "XDG_CACHE_HOME": "relative"}, Path("/home/ada/.cache/stitch")),
        ({"HOME": ""}, None),
        ({"HOME": "/home/ada", "STITCH_CACHE_DIR": "here"}, Path("here")),
    ],
)
def test_cache_directory(environ: dict[str, str], directory: Path | None) -> None:
    assert from_environment(environ).cache_dir == directory


def test_using_nests_and_restores() -> None:
    before = current()
    with using(debug=1, schemes=["local"]) as outer:
        assert current() is outer
        assert (outer.debug, outer.schemes) == (1, ("local",))
        with using(threads="2"):
            assert (current().debug, current().threads) == (1, 2)
        assert current() is outer
        with pytest.raises(RuntimeError), using(debug=2):
            raise RuntimeError
        assert current() is outer
    assert current() is before


def test_using_is_checked() -> None:
    with pytest.raises(UnknownKnob, match="did you mean 'threads'"), using(thread=1):
        pass
    with pytest.raises(InvalidKnob, match="knob debug is True"), using(debug=True):
        pass
    with pytest.raises(InvalidKnob, match="knob cache_bytes is None"), using(cache_bytes=None):
        pass


def test_using_does_not_leak_into_threads() -> None:
    seen: list[Knobs] = []
    outside = current()
    with using(debug=3):
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
    assert seen == [outside]


def test_the_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = current()
    monkeypatch.setenv("STITCH_DEBUG", "4")
    assert current() is before


def test_settings_are_values() -> None:
    assert Knobs(schemes=("global", "local")) == Knobs(schemes=("local", "global"))
    assert len({Knobs(debug=1), Knobs(debug=1), Knobs(debug=2)}) == 2


def test_every_knob_is_described() -> None:
    text = knobs.describe()
    assert all(f"STITCH_{name.upper()}" in text for name in knobs.NAMES)
