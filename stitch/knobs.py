"""The tuning switches, all of them, in one frozen record.

Every knob has a default that suits most; none changes what a model means. A knob `name` is set for a process
by the environment variable `STITCH_NAME`, read once, and for a block of code by `using(name=...)`:

    STITCH_THREADS=4 STITCH_DEBUG=1 python serve.py

    with knobs.using(schemes="independent,local"):
        model = stitch.optimize("model.onnx")

`current()` is what holds here and now. `using` follows the rules of contextvars: it is seen by the calls made
inside the block and by asyncio tasks started there, not by other threads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from stitch.errors import InvalidKnob, UnknownKnob

PREFIX = "STITCH_"
Scheme: TypeAlias = Literal["independent", "local", "regional", "global"]
SCHEMES: tuple[Scheme, ...] = ("independent", "local", "regional", "global")
MOST_THREADS = 4096  # more than any machine has; a team has memory for all of them


class _Reader:
    """How a knob is read, from its own type or from text, and in words what it accepts."""

    def __init__(self, expected: str, read: Callable[[object], object]) -> None:
        self.expected = expected
        self.read = read  # raises ValueError or TypeError for what is not accepted


def _optional(reader: _Reader) -> _Reader:
    return _Reader(reader.expected, lambda given: None if given is None else reader.read(given))


def _whole(at_least: int, at_most: int | None = None) -> _Reader:
    def read(given: object) -> int:
        if isinstance(given, bool) or not isinstance(given, int | str):
            raise TypeError
        value = int(given)
        if value < at_least or (at_most is not None and value > at_most):
            raise ValueError
        return value

    up_to = "or more" if at_most is None else f"to {at_most}"
    return _Reader(f"a whole number, {at_least} {up_to}", read)


def _bytes(at_least: int) -> _Reader:
    number = _whole(at_least)

    def read(given: object) -> object:
        if isinstance(given, str) and (match := re.fullmatch(r"(\d+) *([KMGT])iB", given.strip())):
            given = int(match[1]) << (10 * (1 + "KMGT".index(match[2])))
        return number.read(given)

    return _Reader(f"a number of bytes, {at_least} or more, like 32768, 32KiB, 2MiB or 4GiB", read)


def _vector(given: object) -> object:
    bits = _whole(64, 2048).read(given)
    if not isinstance(bits, int) or bits & (bits - 1):
        raise ValueError
    return bits


def _schemes(given: object) -> tuple[Scheme, ...]:
    if isinstance(given, str):
        given = [name.strip() for name in given.split(",")]
    if not isinstance(given, tuple | list | set | frozenset) or not set(given) <= set(SCHEMES):
        raise ValueError
    return tuple(name for name in SCHEMES if name in given)


_SWITCH = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}


def _switch(given: object) -> bool:
    if isinstance(given, bool):
        return given
    if not isinstance(given, str) or given.strip().lower() not in _SWITCH:
        raise ValueError
    return _SWITCH[given.strip().lower()]


def _path(given: object) -> Path:
    if not isinstance(given, str | os.PathLike) or not os.fspath(given):
        raise TypeError
    return Path(given)


def _text(given: object) -> str:
    if not isinstance(given, str) or not given.strip():
        raise TypeError
    return given.strip()


def _row(reader: _Reader, doc: str) -> dict[str, object]:
    return {"reader": reader, "doc": doc}


@dataclass(frozen=True)
class Knobs:
    """One setting of all knobs. Hashable; values are checked, and text is converted, on construction."""

    schemes: tuple[Scheme, ...] = field(
        default=SCHEMES,
        metadata=_row(
            _Reader(f"a list with commas of some of {', '.join(SCHEMES)}", _schemes),
            "Stitching schemes that may be used, the others being as good as absent. For tests, ablation.",
        ),
    )
    merging: bool = field(
        default=True,
        metadata=_row(
            _Reader("1 or 0, on or off, true or false", _switch),
            "Whether dominants joined by local edges share a loop nest, rather than each having its own. For tests, "
            "ablation.",
        ),
    )
    adaptive_mapping: bool = field(
        default=True,
        metadata=_row(
            _Reader("1 or 0, on or off, true or false", _switch),
            "Whether each loop nest is mapped to lanes and tasks by cost, rather than all by one rule. For tests, "
            "ablation.",
        ),
    )
    winograd: bool = field(
        default=True,
        metadata=_row(
            _Reader("1 or 0, on or off, true or false", _switch),
            "Whether convolutions by 3 x 3 may be computed with fewer multiplications, where that is faster.",
        ),
    )
    cache_dir: Path | None = field(
        default=None,
        metadata=_row(
            _optional(_Reader("the path of a directory", _path)),
            "Where compiled objects are kept. None: nowhere. Where the variable is not set, it is "
            "$XDG_CACHE_HOME/stitch or ~/.cache/stitch.",
        ),
    )
    cache_bytes: int = field(
        default=4 << 30,
        metadata=_row(_bytes(0), "How large that directory may grow, the least recently used going first."),
    )
    debug: int = field(
        default=0,
        metadata=_row(
            _whole(0, 4),
            "What is printed to stderr. 0: nothing. 1: stages and their times. 2: also how the graph was "
            "stitched. 3: also the loop programs. 4: also LLVM IR and assembly.",
        ),
    )
    threads: int | None = field(
        default=None,
        metadata=_row(
            _optional(_whole(1, MOST_THREADS)),
            "Size of the thread team. None: what affinity and the cgroup's quota allow.",
        ),
    )
    target: str | None = field(
        default=None,
        metadata=_row(
            _optional(_Reader("a target as `stitch.target` prints it", _text)),
            "The machine to compile for. None: this one.",
        ),
    )
    l2_bytes: int | None = field(
        default=None,
        metadata=_row(_optional(_bytes(1)), "L2 cache of a core, for decisions. None: the target's."),
    )
    vector_bits: int | None = field(
        default=None,
        metadata=_row(
            _optional(_Reader("a power of two, 64 to 2048", _vector)),
            "Width of the vectors in generated code. None: the target's.",
        ),
    )

    def __post_init__(self) -> None:
        for knob in fields(self):
            given = getattr(self, knob.name)
            reader: _Reader = knob.metadata["reader"]
            try:
                object.__setattr__(self, knob.name, reader.read(given))
            except (TypeError, ValueError):
                raise InvalidKnob(knob.name, given=given, expected=reader.expected) from None


NAMES = tuple(knob.name for knob in fields(Knobs))


def from_environment(environ: Mapping[str, str]) -> Knobs:
    """The knobs that `environ` sets. An empty variable counts as unset; one that is no knob is an error."""
    known = {PREFIX + name.upper(): name for name in NAMES}
    changes: dict[str, Any] = {}
    for variable, value in environ.items():
        if variable.startswith(PREFIX) and variable not in known:
            raise UnknownKnob(variable, knobs=known)
        if variable in known and value.strip():
            changes[known[variable]] = value
    changes.setdefault("cache_dir", _user_cache(environ))
    try:
        return Knobs(**changes)
    except InvalidKnob as error:
        variable = PREFIX + error.knob.upper()
        raise InvalidKnob(variable, given=error.given, expected=error.expected) from None


def current() -> Knobs:
    """The knobs that hold here: those of the innermost `using`, else those of the environment, read once."""
    return _override.get() or _process()


@contextmanager
def using(**changes: object) -> Iterator[Knobs]:
    """Change some of the current knobs inside a `with` block."""
    for name in changes:
        if name not in NAMES:
            raise UnknownKnob(name, knobs=NAMES)
    values: dict[str, Any] = changes
    token = _override.set(replace(current(), **values))
    try:
        yield current()
    finally:
        _override.reset(token)


def describe() -> str:
    """All knobs with their environment variables, defaults and meaning, as text."""
    lines = []
    for knob in fields(Knobs):
        default = ",".join(knob.default) if isinstance(knob.default, tuple) else knob.default
        lines.append(f"{PREFIX}{knob.name.upper()}  (default {default})\n    {knob.metadata['doc']}")
    return "\n".join(lines)


_override: ContextVar[Knobs | None] = ContextVar("stitch knobs", default=None)


@cache
def _process() -> Knobs:
    return from_environment(os.environ)


def _user_cache(environ: Mapping[str, str]) -> Path | None:
    """The user's cache directory by XDG's rules, which ignore relative paths; None without a home."""
    for variable, below in (("XDG_CACHE_HOME", "stitch"), ("HOME", ".cache/stitch")):
        root = Path(environ.get(variable, ""))
        if root.is_absolute():
            return root / below
    return None
