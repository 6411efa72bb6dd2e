"""Boards described in TOML files: those that are not here, or whose numbers were measured.

    load("kirin970")            a board that is part of stitch: see `shipped`
    load("my_board.toml")       a file
    parse(str(board))           what a board's text says

The tables and their names are those of the records in `stitch.topology`; cores are lists of CPUs, ["0", "1", "2-3"].
What a file says must be complete: a number of a described board that is left out, or below zero, is an error, and so is
a name that no record has, since it is most likely another one mistyped. `excluded` and the rates may be absent.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from stitch import target
from stitch.errors import InvalidBoard, UnknownDevice
from stitch.topology import Board, Cache, Cluster, Link, Rates, parse_cpus

FOLDER = Path(__file__).parent / "boards"

# What each table may hold: the type of a field, and whether it must be there and above zero.
_Kind = Literal["text", "count", "number", "rate", "tables", "table", "cores", "cpus"]
_Fields = Mapping[str, tuple[_Kind, bool, bool]]
_BOARD: _Fields = {
    "name": ("text", True, True), "about": ("text", False, False), "target": ("text", True, True),
    "memory": ("count", False, False), "excluded": ("cpus", False, False),
    "clusters": ("tables", True, True), "links": ("tables", False, False),
}  # fmt: skip
_CLUSTER: _Fields = {
    "name": ("text", True, True), "cores": ("cores", True, True), "target": ("text", False, False),
    "capacity": ("count", False, True), "hertz": ("number", False, False), "flops": ("number", False, False),
    "bandwidth": ("number", False, False), "caches": ("tables", False, False), "rates": ("table", False, False),
}  # fmt: skip
_CACHE: _Fields = {
    "level": ("count", True, True), "bytes": ("count", True, True), "shared": ("count", False, True),
    "bandwidth": ("number", False, False),
}  # fmt: skip
_RATES: _Fields = {
    "contraction": ("rate", True, True), "elementwise": ("rate", True, True), "bandwidth": ("rate", True, True),
    "kernel": ("number", True, False), "cores": ("count", True, True), "parallel": ("number", False, False),
}  # fmt: skip
_LINK: _Fields = {
    "source": ("text", True, True), "destination": ("text", True, True), "latency": ("number", True, False),
    "bandwidth": ("rate", True, True),
}  # fmt: skip
MEASURED = ("hertz", "flops", "bandwidth")
"""What a file must say of a cluster; a detected board need not know it."""


def shipped() -> tuple[str, ...]:
    """The names of the boards that are part of stitch."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def load(name: str | Path) -> Board:
    """A board by the name under which it is part of stitch, or from a file, whose name ends in .toml.

    Raises UnknownDevice, InvalidBoard, and OSError for a file that cannot be read."""
    path = Path(name)
    if path.suffix != ".toml":
        if str(name) not in shipped():
            known = [*shipped(), "a file as board.toml"]
            raise UnknownDevice(str(name), available=known, reason="no described board has this name")
        path = FOLDER / f"{name}.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InvalidBoard(str(name), "", "it is not a text in UTF-8") from None
    return parse(text, str(name), complete=True)


def parse(text: str, name: str = "text", *, complete: bool = False) -> Board:
    """The board that a TOML text describes. `complete`: with all numbers of MEASURED. Raises InvalidBoard."""
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise InvalidBoard(name, "", f"it is not TOML: {problem}") from None
    reader = _Reader(name, complete)
    return reader.board(found)


class _Reader:
    """Makes records of tables; `file` and the path of a field stand in every complaint."""

    def __init__(self, file: str, complete: bool) -> None:
        self.file = file
        self.complete = complete

    def board(self, table: Mapping[str, Any]) -> Board:
        values = self.fields(table, _BOARD, "")
        self.target(values["target"], "target")
        clusters = tuple(self.cluster(t, f"clusters[{k}]") for k, t in enumerate(values.pop("clusters")))
        links = tuple(Link(**self.fields(t, _LINK, f"links[{k}]")) for k, t in enumerate(values.pop("links", ())))
        self.distinct((c.name for c in clusters), "clusters", "name")
        self.distinct((cpu for c in clusters for cpu in c.cpus), "clusters", "CPU")
        known = {"*", *(c.name for c in clusters)}
        for k, link in enumerate(links):
            for side in (link.source, link.destination):
                if side not in known:
                    raise self.wrong(f"links[{k}]", f"there is no cluster {side!r}", _words(sorted(known)))
        return Board(clusters=clusters, links=links, **values)

    def cluster(self, table: Mapping[str, Any], where: str) -> Cluster:
        values = self.fields(table, _CLUSTER, where)
        if values.get("target"):
            self.target(values["target"], f"{where}.target")
        for name in MEASURED if self.complete else ():
            if values.get(name, 0) <= 0:
                there = "must be above zero" if name in values else "is missing"
                raise self.wrong(f"{where}.{name}", f"it {there}", "say what was measured, or is published")
        caches = tuple(
            Cache(**self.fields(t, _CACHE, f"{where}.caches[{k}]")) for k, t in enumerate(values.pop("caches", ()))
        )
        rates = values.pop("rates", None)
        if rates is not None:
            rates = Rates(**self.fields(rates, _RATES, f"{where}.rates"))
            if rates.parallel > 1:
                raise self.wrong(f"{where}.rates.parallel", "it is a share, 0 to 1")
        return Cluster(caches=caches, rates=rates, **values)

    def fields(self, table: Mapping[str, Any], known: _Fields, where: str) -> dict[str, Any]:
        """The values of a table; what each must be like is told by `known`."""
        before = f"{where}." if where else ""
        for name in table:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                advice = f"did you mean {close[0]!r}?" if close else f"the fields are {_words(known)}"
                raise self.wrong(before + name, "there is no such field", advice)
        found = {}
        for name, (kind, needed, positive) in known.items():
            if name in table:
                found[name] = self.value(table[name], kind, positive, before + name)
            elif needed:
                raise self.wrong(before + name, "it is missing", f"the fields are {_words(known)}")
        return found

    def value(self, value: Any, kind: _Kind, positive: bool, where: str) -> Any:
        match kind:
            case "text" if isinstance(value, str) and (value or not positive):
                return value
            case "count" if isinstance(value, int) and not isinstance(value, bool):
                return self.positive(value, positive, where)
            case "number" | "rate" if isinstance(value, int | float) and not isinstance(value, bool):
                if math.isnan(value) or (kind == "number" and math.isinf(value)):
                    raise self.wrong(where, f"{value} is not a number to calculate with")
                return self.positive(float(value), positive, where)
            case "tables" if isinstance(value, list) and all(isinstance(t, dict) for t in value):
                if value or not positive:
                    return value
            case "table" if isinstance(value, dict):
                return value
            case "cores" if isinstance(value, list) and value and all(isinstance(t, str) for t in value):
                return tuple(self.cpus(t, f"{where}[{k}]") for k, t in enumerate(value))
            case "cpus" if isinstance(value, str):
                return self.cpus(value, where) if value else ()
        expected = {
            "text": "a text", "count": "a whole number", "number": "a number", "rate": "a number",
            "tables": "a list of tables", "table": "a table", "cores": 'a list of CPUs as ["0", "1", "2-3"]',
            "cpus": "a list of CPUs as 0-3",
        }[kind]  # fmt: skip
        raise self.wrong(where, f"{value!r} is not {expected}{' that is not empty' if positive else ''}")

    def positive(self, value: float, above: bool, where: str) -> float:
        if value < 0 or (above and value == 0):
            raise self.wrong(where, f"{value} must be {'above zero' if above else 'zero or more'}")
        return value

    def cpus(self, text: str, where: str) -> tuple[int, ...]:
        try:
            found = parse_cpus(text)
        except ValueError as problem:
            raise self.wrong(where, str(problem)) from None
        if not found:
            raise self.wrong(where, "a core has at least one CPU")
        return found

    def distinct(self, values: Iterable[object], where: str, what: str) -> None:
        seen: set[object] = set()
        for value in values:
            if value in seen:
                raise self.wrong(where, f"{what} {value!r} is there twice")
            seen.add(value)

    def target(self, text: str, where: str) -> None:
        try:
            target.parse(text)
        except ValueError as problem:
            raise self.wrong(where, str(problem)) from None

    def wrong(self, where: str, problem: str, advice: str = "") -> InvalidBoard:
        return InvalidBoard(self.file, where, problem, advice)


def _words(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
