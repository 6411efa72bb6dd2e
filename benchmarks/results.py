"""benchmarks/RESULTS.md: sections between markers, each replaced as a whole when it is measured again."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import sys
from pathlib import Path

PATH = Path(__file__).resolve().parent / "RESULTS.md"
HEAD = """# Results

Each section was written by the command that it names (`--record`), on the machine that it names. How they are
measured, and what they do not say: [docs/benchmarks.md](../docs/benchmarks.md).
"""
ORDER = ("latency", "shapes", "chains", "loading", "overhead", "ablation", "pressure")
FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "asimd", "asimddp", "sve", "sve2")
PACKAGES = ("onnxruntime", "llvmlite", "numpy", "onnx")

BUSY = "The machine was busy with other work: figures of more than one thread are to be measured again."


def record(name: str, title: str, text: str) -> None:
    """Put a section in its place, and the others stay as they are."""
    found = dict(re.findall(r"<!-- begin ([\w-]+) -->\n(.*?)<!-- end \1 -->\n", _read(), re.DOTALL))
    found[name] = f"## {title}\n\n{text.strip()}\n"
    names = [n for n in ORDER if n in found] + [n for n in found if n not in ORDER]
    sections = [f"<!-- begin {n} -->\n{found[n]}<!-- end {n} -->\n" for n in names]
    PATH.write_text("\n".join([HEAD, *sections]), encoding="utf-8")
    print(f"recorded in {PATH.name}: {title}")


def _read() -> str:
    return PATH.read_text(encoding="utf-8") if PATH.exists() else ""


def origin() -> str:
    """Command, date, machine and versions, as a list."""
    module = sys.modules["__main__"].__spec__
    given = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]  # places of this machine say nothing
    command = shlex.join(["python", "-m", module.name if module else "benchmarks", *given])
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    import stitch

    load = os.getloadavg()[0]
    lines = [
        f"* `{command}`, {datetime.datetime.now(datetime.UTC).date()}, load average at the end {load:.1f}",
        f"* {machine()}",
        f"* stitch {stitch.__version__}, {', '.join(versions)}",
    ]
    if load > len(os.sched_getaffinity(0)) + 1:
        lines.append(f"* {BUSY}")
    return "\n".join(lines)


def machine() -> str:
    """Processor, cores that we may use, vector features, caches, memory."""
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        cpu = ""

    def first(*fields: str) -> str:
        for field in fields:
            if match := re.search(rf"^{field}\s*: (.*)$", cpu, re.MULTILINE):
                return match[1]
        return ""

    family = f" (family {first('cpu family')}, model {first('model')})" if first("cpu family") else ""
    flags = set(first("flags", "Features").split())
    known = ", ".join(f for f in FEATURES if f in flags) or "none known"
    virtual = ", virtual" if "hypervisor" in flags else ""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{first('model name') or platform.machine()}{family}, {cores} cores{virtual}; {known}; caches {_caches()}; "
        f"{memory:.0f} GiB; Linux {platform.release().split('-')[0]}"
    )


def _caches() -> str:
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / f).read_text().strip() for f in ("level", "type", "size"))
        if kind != "Instruction":
            found.append(f"L{level} {size}")
    return ", ".join(found) or "unknown"
