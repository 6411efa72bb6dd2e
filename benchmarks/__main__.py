"""What can be measured and checked, and how: python -m benchmarks [--quick]"""

from __future__ import annotations

import subprocess
import sys

from benchmarks import models, oracle

TEXT = """\
Speed, each a command of its own; --record writes its table into benchmarks/RESULTS.md:

  python -m benchmarks.latency [--models NAME ...] [--threads 1,2] [--rounds N] [--variants] [--record]
      one inference beside onnxruntime, OpenVINO and the machine's limit, model by model; everything takes about
      {minutes} minutes here, and three times as long with --variants: larger batches and shorter sequences
  python -m benchmarks.chains [--cases PATTERN ...] [--sizes small,l3,dram] [--threads 1,2] [--record]
      chains of memory-bound operators beside eight engines (make bench-setup) and the machine's limits; 40 minutes
  python -m benchmarks.ablation [--record]
      what each step of stitching brings
  python -m benchmarks.pressure [--record]
      the thread team beside busy neighbours, and under a quota
  python -m benchmarks.loading [--model PATH | --models [NAME ...]] [--record]
      from a file to a model: empty cache, second process, the peers; the first run, and the peak of memory
  python -m benchmarks.overhead [--record]
      what a call and a further kernel cost; that a run keeps no memory
  python -m benchmarks.profile NAME|PATH [--threads N] [--top K] [--peer]
      where a model's time goes, kernel by kernel, with loop programs; --peer: onnxruntime's profile
  python -m benchmarks.placement [--fit | --scale] [--seeds N]
      pipelines on a simulated Kirin 970, exact and by Pipe-it's heuristic, also with wrong predictions
  python -m benchmarks.sharing PATH ... [--slow SHARE | --quota SHARE]
      one input on two cores that share operators, also where one is slower, or stopped now and then
  python -m benchmarks.contract
      the multiply-add micro-kernels beside the processor's limit
  python -m benchmarks.demo [MODEL]
      one model from end to end, with and without stitching

Right or wrong:

  python -m benchmarks.models [NAME ...]    whole models against references
  python -m benchmarks.nodes                ONNX's own suite, operator by operator
  python -m benchmarks.oracle [NAME ...]    numpy on the primitives against stored outputs
  python -m benchmarks.ulp [NAME ...]       the math library's largest errors

How it is measured: docs/benchmarks.md. Results so far: benchmarks/RESULTS.md.
"""


def main() -> int:
    names = models.names()
    counted = {c: [n for k, n in names if k == c] for c in ("shared", "light", "exports")}
    print(TEXT.format(minutes=max(1, round(0.5 * len(names)))))
    print("Models found:")
    for collection, found in counted.items():
        print(f"  {collection:8} {' '.join(found) or 'none'}")
    if oracle.folder() is None:
        print("  ONNX_MODELS names the folder of real models with references")
    if models.exports() is None:
        print("  `make exports` makes the large architectures, or ONNX_EXPORTS names their folder")
    if "--quick" not in sys.argv[1:]:
        return 0
    print("\nA quick selection: python -m benchmarks.latency --quick; python -m benchmarks.overhead\n", flush=True)
    codes = [
        subprocess.run([sys.executable, "-m", *command], cwd=models.ROOT, check=False).returncode
        for command in (["benchmarks.latency", "--quick"], ["benchmarks.overhead"])
    ]
    print("\nAll of it, and what else there is: python -m benchmarks")
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
