"""One stage of a pipeline: a part of a model, loaded, with the CPUs that it runs on.

A stage that streams keeps what later stages read of it in slots, a few sets of arrays that are written in turn. A set
is made by the first run of its slot, and again when shapes change; in the steady state nothing is allocated for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from stitch.bundle import Given, Made, Sizes, Source
from stitch.runtime.affinity import Cpus
from stitch.runtime.device import Run
from stitch.runtime.memory import Blocks

Arrays = list[np.ndarray]


@dataclass(eq=False)
class Slot:
    """One set of a stage's outputs. `key`: the shapes of the inputs for which `arrays` fit."""

    key: tuple[tuple[int, ...], ...] | None = None
    arrays: Arrays = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Stage:
    """`sources`: where each input comes from, parts being stages. `cpus`: where it runs, None: anywhere. `follows`:
    whether the shapes of its outputs follow from those of its inputs. `outputs`: how many it has."""

    name: str
    run: Run
    sources: tuple[Source, ...]
    cpus: Cpus | None = None
    follows: bool = True
    outputs: int = 0
    blocks: Blocks = field(default_factory=Blocks)  # for results that are new each time

    def inputs(self, given: Arrays, made: Sequence[Arrays | None]) -> Arrays:
        """Its inputs, among those of the model and what earlier stages have made."""
        arrays = []
        for part, at in self._places:
            if part == _GIVEN:
                arrays.append(given[at])
            elif part == _SIZES:
                arrays.append(np.empty([given[i].shape[axis] for i, axis in self._axes[at]] + [0], np.uint8))
            else:
                arrays.append(made[part][at])  # type: ignore[index]
        return arrays

    def fill(self, arrays: Arrays, slot: Slot | None, fresh: frozenset[int]) -> Arrays:
        """The outputs for these inputs. All are new without a slot; else those whose numbers are in `fresh`."""
        if slot is None or not self.follows:
            return self.run(arrays, None)
        key = tuple([array.shape for array in arrays])
        if slot.key != key:
            results = self.run(arrays, None)
            slot.key, slot.arrays = key, [_like(r) if k in fresh else r for k, r in enumerate(results)]
            return results
        outputs = slot.arrays
        if fresh:
            outputs = [self.blocks.array(a.shape, a.dtype) if k in fresh else a for k, a in enumerate(outputs)]
        return self.run(arrays, outputs)

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        places = []
        for source in self.sources:
            match source:
                case Given(input):
                    places.append((_GIVEN, input))
                case Made(part, output):
                    places.append((part, output))
                case Sizes():
                    places.append((_SIZES, len([p for p in places if p[0] == _SIZES])))
        return places

    @cached_property
    def _axes(self) -> list[tuple[tuple[int, int], ...]]:
        return [source.axes for source in self.sources if isinstance(source, Sizes)]


_GIVEN, _SIZES = -1, -2


def _like(array: np.ndarray) -> np.ndarray:
    """Something of the same shape and type that takes no memory."""
    return np.broadcast_to(np.empty((), array.dtype), array.shape)
