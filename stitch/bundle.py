"""A model in parts: an artifact for each, and which value goes where.

    parts      in an order in which they may run
    sources    for each part, where each of its inputs comes from
    results    for each output of the model, which part gives it

The first part takes all inputs of the model, whether it reads them or not: so that whatever the model has against its
inputs is found there, before anything runs. A later part whose inputs do not show all symbols that its code needs is
given them as the shape of an array without elements (`Sizes`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stitch.plan import Artifact, HostStep, Port


@dataclass(frozen=True)
class Given:
    """An input of the model, by its position."""

    input: int


@dataclass(frozen=True)
class Made:
    """An output of an earlier part, by its position there."""

    part: int
    output: int


@dataclass(frozen=True)
class Sizes:
    """uint8 of the shape (..., 0): `axes` are the model's inputs, and axes of them, whose extents come first."""

    axes: tuple[tuple[int, int], ...]


Source = Given | Made | Sizes


@dataclass(frozen=True, eq=False)
class Bundle:
    """`report` is that of the model as a whole."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    parts: tuple[Artifact, ...]
    sources: tuple[tuple[Source, ...], ...]
    results: tuple[Made, ...]
    report: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises ValueError unless everything comes from before, and fits."""
        fits = len(self.parts) == len(self.sources) > 0 and len(self.results) == len(self.outputs)
        for number, (part, sources) in enumerate(zip(self.parts, self.sources, strict=False)):
            fits = fits and len(sources) == len(part.inputs)
            for source in sources:
                match source:
                    case Given(input):
                        fits = fits and 0 <= input < len(self.inputs)
                    case Made(other, output):
                        fits = fits and 0 <= other < number and 0 <= output < len(self.parts[other].outputs)
                    case Sizes(axes):
                        fits = fits and all(
                            0 <= i < len(self.inputs) and 0 <= a < len(self.inputs[i].shape) for i, a in axes
                        )
        for made in self.results:
            fits = fits and 0 <= made.part < len(self.parts) and 0 <= made.output < len(self.parts[made.part].outputs)
        if not fits:
            raise ValueError("not a bundle: its wires do not fit its parts")


def whole(artifact: Artifact) -> Bundle:
    """A model in one part."""
    sources = tuple(Given(k) for k in range(len(artifact.inputs)))
    results = tuple(Made(0, k) for k in range(len(artifact.outputs)))
    return Bundle(artifact.inputs, artifact.outputs, (artifact,), (sources,), results, artifact.report)


def shapes_follow(artifact: Artifact) -> bool:
    """Whether the shapes of its outputs follow from those of its inputs, and not from what is in them."""
    return not any(isinstance(step, HostStep) for step in artifact.steps)


# ------------------------------------------------------------------ the wires as text


def wires(bundle: Bundle) -> str:
    """All but the parts, as JSON; `report` must consist of what JSON has, and tuples."""
    return json.dumps({
        "inputs": [_port(p) for p in bundle.inputs],
        "outputs": [_port(p) for p in bundle.outputs],
        "sources": [[_source(s) for s in sources] for sources in bundle.sources],
        "results": [[m.part, m.output] for m in bundle.results],
        "report": dict(bundle.report),
    })  # fmt: skip


def joined(text: str, parts: Sequence[Artifact]) -> Bundle:
    """The bundle of these wires and parts. Raises ValueError, KeyError or TypeError for wires that are none."""
    data = json.loads(text)
    inputs, outputs = ([Port(n, d, tuple(s)) for n, d, s in data[key]] for key in ("inputs", "outputs"))
    sources = tuple(tuple(_read(s) for s in row) for row in data["sources"])
    results = tuple(Made(*m) for m in data["results"])
    bundle = Bundle(tuple(inputs), tuple(outputs), tuple(parts), sources, results, data["report"])
    bundle.check()
    return bundle


def _port(port: Port) -> list[Any]:
    return [port.name, port.dtype, list(port.shape)]


def _source(source: Source) -> list[Any]:
    match source:
        case Given(input):
            return ["given", input]
        case Made(part, output):
            return ["made", part, output]
        case Sizes(axes):
            return ["sizes", *map(list, axes)]


def _read(row: Sequence[Any]) -> Source:
    match row:
        case ["given", int(input)]:
            return Given(input)
        case ["made", int(part), int(output)]:
            return Made(part, output)
        case ["sizes", *axes]:
            return Sizes(tuple((int(i), int(a)) for i, a in axes))
    raise ValueError(f"not a source: {row!r}")
