"""The networks that are measured, with their inputs: everything in float32 that is found."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, oracle

Array = np.ndarray[Any, Any]
Feed = dict[str, Array]
Sizes = Mapping[str, int]

BATCH = 4  # of the variant with a larger one


@dataclass(frozen=True)
class Network:
    """A model with a feed for each choice of its dims. `noise` is how far a correct runtime may be off beside a
    thousandth of the largest number."""

    collection: str
    name: str
    path: Path
    feeds: Mapping[str, Feed]  # by what to call the dims
    noise: float = 0.0

    @property
    def feed(self) -> Feed:
        """As the model comes."""
        return next(iter(self.feeds.values()))


def networks(
    wanted: Sequence[str], folder: Path, sizes: Sizes | None = None, varied: bool = False
) -> Iterator[Network]:
    """Everything in float32 that is there, or those named. `folder`: for models that have to be written first.
    `sizes` are for exports, whose dims are open, instead of their own; `varied` takes several, see `variants`."""
    for collection, name in models.names():
        if wanted and name not in wanted and f"{collection}_{name}" not in wanted:
            continue
        match collection:
            case "shared":
                case = next(iter(oracle.cases([name])))
                if case.tolerance == "fp32":
                    noise = max(case.noise.values(), default=0.0)
                    yield Network(collection, name, case.path, {"": case.feed()}, noise)
            case "light":
                path = folder / f"{name}.onnx"
                feed = image(models.light() / path.name)
                give_weights(models.light() / path.name, path)
                yield Network(collection, name, path, {"": feed})
                path.unlink()
            case "exports":
                root = models.exports()
                assert root is not None
                spec = json.loads((root / f"{name}.json").read_text())
                if spec["tolerance"] == "fp32":
                    default = {k: (sizes or {}).get(k, n) for k, n in spec["dims"].items()}
                    chosen = variants(default) if varied else [default]
                    feeds = {label(dims): models.make_feed(spec, dims) for dims in chosen}
                    yield Network(collection, name, root / spec["file"], feeds)


def variants(default: Sizes) -> list[dict[str, int]]:
    """The dims themselves, a larger batch, and half of every other length that has a half."""
    halved = {k: n if k == "batch" else max(n // 2, 1) for k, n in default.items()}
    found = [dict(default), {**default, "batch": BATCH} if "batch" in default else dict(default), halved]
    return [dims for k, dims in enumerate(found) if dims not in found[:k]]


def label(sizes: Sizes) -> str:
    return " ".join(f"{k}={n}" for k, n in sizes.items())


def image(path: Path, sizes: Sizes | None = None) -> Feed:
    """Noise for the inputs of a model that are not weights; a dim that is open is 1, or what `sizes` says."""
    import onnx
    from onnx import helper

    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {w.name for w in graph.initializer}
    rng = np.random.default_rng(models.SEED)
    feed = {}
    for i in graph.input:
        if i.name not in weights:
            kind = i.type.tensor_type
            shape = [d.dim_value or (sizes or {}).get(d.dim_param, 1) for d in kind.shape.dim]
            feed[i.name] = rng.standard_normal(shape).astype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return feed


def give_weights(source: Path, path: Path) -> None:
    """The model with random weights. In the original every weight is the same number, which stitch would make use of,
    and which drives activations into denormals, where onnxruntime crawls: neither says anything about real models."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(source))
    graph = model.graph
    shapes = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    rng = np.random.default_rng(models.SEED)
    kept = []
    for node in graph.node:
        shape = shapes.get(node.input[0]) if node.op_type == "ConstantOfShape" else None
        if shape is None:
            kept.append(node)
        elif len(shape) > 1:
            scale = 1 / math.sqrt(math.prod(shape[1:].tolist()))
            weights = rng.standard_normal(shape.tolist(), np.float32) * np.float32(scale)
            graph.initializer.append(numpy_helper.from_array(weights, node.output[0]))
        else:
            weights = rng.uniform(0.9, 1.1, shape.tolist()).astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(weights, node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)
    onnx.save(model, str(path))
