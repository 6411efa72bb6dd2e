"""How well the cost model predicts: fitted to the networks of a calibration, tested on models that it has not seen.

    python -m benchmarks.prediction [--threads N] [--record] [NAME ...]

Prints the mean absolute error by family of kernels, weighted by time too, and the ratio of predicted and measured time
of each model, for both sets. Each phase of a kernel is timed by itself, in the model that it is part of; phases below
2 us count in the whole, not in the mean.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import results
from benchmarks.profile import subject
from stitch import calibration, importer
from stitch.calibration.networks import all_networks
from stitch.codegen import machine
from stitch.cost import Rates
from stitch.measure import Probe, Sample, family

UNSEEN = (
    "resnet50", "mobilenet_v2", "efficientnet_b0", "convnext_tiny", "vit_small", "swin_tiny", "segformer_b0",
    "bert_base", "distilbert", "gpt2_small", "t5_small_encoder", "llama_small", "llama_small_decode",
    "light_squeezenet", "light_densenet121", "light_inception_v1", "light_shufflenet", "ultraface_rfb320",
    "yunet_n_dyn",
)  # fmt: skip

SECONDS = 0.6


@dataclass(frozen=True)
class Row:
    model: str
    family: str
    sample: Sample
    predicted: float


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument(
        "models", nargs="*", metavar="NAME", help="to test on; those that are there of a list otherwise"
    )
    reader.add_argument("--threads", type=int, default=1)
    reader.add_argument("--record", action="store_true", help="write the tables to benchmarks/RESULTS.md")
    asked = reader.parse_args()
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: asked.threads]))
    target = machine.host()
    seen = [(n.name, s) for n in all_networks() for s in calibration.samples(n, target)]
    rates = calibration.fit(s for _, s in seen)
    if asked.threads > 1:
        rates = calibration.with_teams(rates, target)
        seen = [(n.name, s) for n in all_networks() for s in calibration.samples(n, target, asked.threads)]
    text = [f"With {asked.threads} thread{'s' if asked.threads > 1 else ''}:", ""]
    text += tables("fitted to", rows(seen, rates, asked.threads))
    unseen = [(name, s) for name in asked.models or UNSEEN for s in samples(name, asked.threads)]
    text += ["", *tables("not seen", rows(unseen, rates, asked.threads))]
    print("\n".join(text))
    if asked.record:
        results.record("prediction", "What the cost model predicts", "\n".join([results.origin(), "", *text]))


def samples(name: str, threads: int) -> list[Sample]:
    """The phases of a model, with its results in the same memory each time; none if it is not there."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path, feed = subject(name, {}, Path(folder))
        except SystemExit:
            return []
        probe = Probe.of(importer.load(path), machine.host(), threads)
        return probe.samples([feed[p.name] for p in probe.artifact.inputs], SECONDS, outputs=True)


def rows(found: Iterable[tuple[str, Sample]], rates: Rates, threads: int) -> list[Row]:
    return [Row(name, family(s.kernel), s, rates.seconds(s.work, threads)) for name, s in found]


def tables(title: str, found: Sequence[Row]) -> list[str]:
    """By family, and by model."""
    lines = [f"| {title}: kernels | phases | mean absolute error | weighted by time | predicted / measured |"]
    lines.append("|---|---:|---:|---:|---:|")
    for name in dict.fromkeys(r.family for r in found):
        mine = [r for r in found if r.family == name]
        times, guesses = np.array([[r.sample.seconds, r.predicted] for r in mine]).T
        counted = times > calibration.SHORT
        error = np.abs(guesses / times - 1)[counted].mean() if counted.any() else float("nan")
        weighted = np.abs(guesses - times).sum() / times.sum()
        ratio = guesses.sum() / times.sum()
        lines.append(f"| {name} | {counted.sum()} | {100 * error:.1f} % | {100 * weighted:.1f} % | {ratio:.2f} |")
    models = {name: [r for r in found if r.model == name] for name in dict.fromkeys(r.model for r in found)}
    ratios = {name: sum(r.predicted for r in m) / sum(r.sample.seconds for r in m) for name, m in models.items()}
    off = [abs(r - 1) for r in ratios.values()]
    lines += ["", f"Whole models, {title}: mean absolute error {100 * float(np.mean(off)):.1f} %, at most "
              f"{100 * max(off):.1f} %. Predicted / measured: "
              + ", ".join(f"{name} {r:.2f}" for name, r in ratios.items()) + "."]  # fmt: skip
    return lines


if __name__ == "__main__":
    main()
