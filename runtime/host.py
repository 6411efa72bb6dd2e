"""Steps that run on numpy, between native ones: what does not pay, or cannot be done, in compiled code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from stitch.errors import StitchError
from stitch.plan import HostStep

Function = Callable[..., tuple[np.ndarray, ...]]  # (attrs, *arrays), None for an input that is absent


def functions() -> Mapping[str, Function]:
    """The functions that artifacts name. Imported on first use: most models need none."""
    from stitch.ops.host import FUNCTIONS

    return FUNCTIONS


def call(step: HostStep, known: Mapping[str, Function], arguments: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    """The step's results, each an array in C order. What goes wrong is reported in the model's names."""
    node, operator = step.origin
    what = f"operator {operator or step.function} of node {node!r}" if node else f"operator {operator or step.function}"
    function = known.get(step.function)
    if function is None:
        raise StitchError(f"{what} needs {step.function}, which this stitch lacks", "compile the model again")
    try:
        results: Sequence[Any] = function(step.attrs, *arguments)
    except StitchError:
        raise
    except Exception as error:
        raise StitchError(f"{what} failed: {error}") from error
    if len(results) < len(step.outputs):
        raise StitchError(f"{what} gave {len(results)} results instead of {len(step.outputs)}")
    return [np.asarray(result, order="C") for result in results]
