"""The structure of the code, checked on its syntax: what may import what, and the doors to libraries.

Every import statement counts, wherever it stands: inside a function and under TYPE_CHECKING too.
"""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"stitch": "stitch", "stitch.codegen": "codegen", "stitch.runtime": "runtime"}

# A module imports only modules that stand above it here. To add a module, add its name.
# `stitch.x` is the module of that name, or a package's `__init__`; `stitch.x.*` is what the package has beyond the
# lines with names, and those files may not import each other.
TABLE = """
    stitch
    stitch.errors
    stitch.sizes
    stitch.knobs
    stitch.dtypes
    stitch.target
    stitch.cost
    stitch.topology
    stitch.boardfile
    stitch.detection
    stitch.devices
    stitch.placement
    stitch.placement.problem
    stitch.placement.throughput
    stitch.placement.pipeit
    stitch.placement.cut
    stitch.placement.latency
    stitch.placement.memory
    stitch.placement.split
    stitch.placement.sharing
    stitch.simulate
    stitch.simulate.events
    stitch.simulate.gantt
    stitch.plan
    stitch.decision
    stitch.bundle
    stitch.peak

    stitch.dims.expressions
    stitch.dims.intervals
    stitch.dims.factors
    stitch.dims.functions
    stitch.dims.equality
    stitch.dims.evaluation
    stitch.dims.parsing
    stitch.dims
    stitch.limits
    stitch.ranges
    stitch.ops
    stitch.ops.host
    stitch.ops.primitives
    stitch.contents
    stitch.graph
    stitch.text
    stitch.evaluate
    stitch.access
    stitch.ops.registry
    stitch.ops.movement
    stitch.ops.contractions
    stitch.ops.convolution
    stitch.ops.transposed
    stitch.ops.activations
    stitch.ops.*
    stitch.inputs
    stitch.weights
    stitch.source
    stitch.importer
    stitch.rewrite
    stitch.simplify.permutations
    stitch.simplify.folding
    stitch.simplify.algebra
    stitch.simplify.halves
    stitch.simplify.movement
    stitch.simplify.contractions
    stitch.simplify.moments
    stitch.simplify.quotients
    stitch.simplify.winograd
    stitch.simplify.sinking
    stitch.simplify.hoisting
    stitch.simplify.linear
    stitch.simplify.pieces
    stitch.simplify.pooling
    stitch.simplify.passes
    stitch.simplify
    stitch.stitching
    stitch.stitching.trace
    stitch.stitching.legalise
    stitch.stitching.schedule
    stitch.stitching.dominants
    stitch.stitching.contractions
    stitch.stitching.schemes
    stitch.stitching.parts
    stitch.stitching.stages
    stitch.stitching.chains
    stitch.stitching.clusters
    stitch.stitching.stitch
    stitch.simulate.work
    stitch.simulate.model
    stitch.partition

    stitch.codegen
    stitch.codegen.loops
    stitch.codegen.loop_rules
    stitch.codegen.loop_text
    stitch.codegen.sums
    stitch.codegen.polynomials
    stitch.codegen.tables
    stitch.codegen.trigonometry
    stitch.codegen.mathlib
    stitch.codegen.bits
    stitch.codegen.quotients
    stitch.codegen.contract
    stitch.codegen.constants
    stitch.codegen.emit_rules
    stitch.codegen.tops
    stitch.codegen.lower
    stitch.codegen.splitting
    stitch.codegen.across
    stitch.codegen.rows
    stitch.codegen.mapping
    stitch.codegen.tiling
    stitch.codegen.divisors
    stitch.codegen.peeling
    stitch.codegen.blocks
    stitch.codegen.windows
    stitch.codegen.ahead
    stitch.codegen.abreast
    stitch.codegen.narrowing
    stitch.codegen.interp
    stitch.codegen.lookups
    stitch.codegen.kernels
    stitch.codegen.traffic
    stitch.codegen.descriptors
    stitch.codegen.emit_code
    stitch.codegen.emit_values
    stitch.codegen.emit_math
    stitch.codegen.emit_dims
    stitch.codegen.emit_storage
    stitch.codegen.emit_casts
    stitch.codegen.emit_primitives
    stitch.codegen.emit_memory
    stitch.codegen.emit_sums
    stitch.codegen.emit_kernels
    stitch.codegen.emit_endings
    stitch.codegen.transpose
    stitch.codegen.emit_expressions
    stitch.codegen.emit_folds
    stitch.codegen.emit_loops
    stitch.codegen.emit_calls
    stitch.codegen.llvm
    stitch.codegen.entry
    stitch.codegen.inplace
    stitch.codegen.arena
    stitch.codegen.sequence
    stitch.codegen.assemble
    stitch.codegen.machine

    stitch.runtime
    stitch.runtime.memory
    stitch.runtime.shares
    stitch.runtime.team
    stitch.runtime.threads
    stitch.runtime.device
    stitch.runtime.cache
    stitch.runtime.calls
    stitch.runtime.cpu
    stitch.runtime.host
    stitch.runtime.planning
    stitch.runtime.binding
    stitch.runtime.executable
    stitch.runtime.affinity
    stitch.runtime.stage
    stitch.runtime.stream
    stitch.runtime.pipeline
    stitch.runtime.delegate

    stitch.model
    stitch.explain
    stitch.report
    stitch.compiler
    stitch.measure
    stitch.fitting
    stitch.calibration.networks
    stitch.calibration
    stitch.calibration.command
    stitch.shared
    stitch.placed
    stitch.pipelined
    stitch.delegation
    stitch.delegated
    stitch.trial
    stitch.api
    stitch.backend
    stitch.simulate.team
    stitch.simulate.command
    stitch.cli_stream
    stitch.cli
    stitch.__main__
"""
LAYERS = TABLE.split()

# Packages that see less than what is above them: of `stitch`, only these modules, and themselves.
CONFINED = {
    "stitch.runtime": [
        "stitch.errors",
        "stitch.knobs",
        "stitch.dtypes",
        "stitch.target",
        "stitch.plan",
        "stitch.bundle",
        "stitch.ops.host",
    ],
    "stitch.ops.host": [],
}

# Which modules may import a library; libraries that are not listed are free.
DOORS = {
    "onnx": ["stitch.source", "stitch.importer", "stitch.delegation", "stitch.backend"],
    "onnxruntime": ["stitch.runtime.delegate"],
    "sympy": ["stitch.dims.factors"],
    "llvmlite": ["stitch.codegen.machine", "stitch.runtime.cpu"],
}


@dataclass(frozen=True)
class Module:
    name: str
    tree: ast.Module
    path: Path


@dataclass(frozen=True)
class Import:
    target: str  # as written: a module, or a name in one
    line: int


def modules() -> dict[str, Module]:
    """All modules of the project by name. The links stitch/codegen and stitch/runtime are skipped."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder)
            if package == "stitch" and inside.parts[0] in ("codegen", "runtime"):
                continue
            name = ".".join([package, *inside.with_suffix("").parts]).removesuffix(".__init__")
            found[name] = Module(name, ast.parse(path.read_text(encoding="utf-8"), str(path)), path)
    return found


def imports(tree: ast.Module) -> Iterator[Import]:
    """What a module imports. `from a import b` is `a.b`, which may or may not be a module."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (Import(alias.name, node.lineno) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                start = "." * level + (module or "")
                yield from (Import(f"{start}.{alias.name}", node.lineno) for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(target)), *_],
            ):
                yield Import(target, node.lineno)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer(name: str) -> int | None:
    """The line of LAYERS that a module stands on: its own, else the `.*` of its package."""
    for line in (name, f"{name.rpartition('.')[0]}.*"):
        if line in LAYERS:
            return LAYERS.index(line)
    return None


def resolve(target: str, known: set[str]) -> str | None:
    """The project's module that an import reaches: the longest part of `target` that is one."""
    parts = target.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in known or name in LAYERS:
            return name
    return None


def breaches(module: Module, known: set[str]) -> list[str]:
    """What is wrong with a module's imports, one line of text each."""
    own = layer(module.name)
    if own is None:
        return [f"{module.name} has no place in LAYERS"]
    wrong = []
    for found in imports(module.tree):
        where = f"{module.path.relative_to(ROOT)}:{found.line} imports {found.target}"
        library = found.target.split(".")[0]
        if found.target.startswith("."):
            wrong.append(f"{where}: write it absolutely")
        elif library in DOORS and not any(within(module.name, door) for door in DOORS[library]):
            wrong.append(f"{where}: {library} only in {', '.join(DOORS[library])}")
        elif library in ("codegen", "runtime"):
            wrong.append(f"{where}: it is stitch.{library}")
        elif (reached := resolve(found.target, known)) is not None and module.name != "stitch":
            other = layer(reached)
            if other is None:
                wrong.append(f"{where}: {reached} has no place in LAYERS")
            elif other >= own:
                wrong.append(f"{where}: {LAYERS[other]} is not above {LAYERS[own]}")
            for package, allowed in CONFINED.items():
                if within(module.name, package) and not any(within(reached, p) for p in [package, *allowed]):
                    wrong.append(f"{where}: {package} sees only {', '.join(allowed) or 'itself'}")
            if within(module.name, "stitch.codegen") and within(reached, "stitch.runtime"):
                wrong.append(f"{where}: codegen and runtime never import each other")
    return wrong


MODULES = modules()


@pytest.mark.parametrize("name", MODULES)
def test_imports(name: str) -> None:
    assert breaches(MODULES[name], set(MODULES)) == []


def test_layers_has_no_duplicates() -> None:
    assert len(LAYERS) == len(set(LAYERS))


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("stitch.dims", "from stitch.graph import Graph", "stitch.graph is not above stitch.dims"),
        ("stitch.dims", "def f():\n    import stitch.graph", "stitch.graph is not above stitch.dims"),
        ("stitch.dims", "from stitch import graph", "stitch.graph is not above stitch.dims"),
        ("stitch.ops.act", "from stitch.ops.matrix import gemm", "stitch.ops.* is not above stitch.ops.*"),
        ("stitch.ops.act", "from stitch.ops.movement import take", None),
        ("stitch.graph", "from stitch import optimize", None),
        ("stitch.graph", "from stitch.errors import StitchError\nfrom stitch.dims import Dim", None),
        ("stitch.graph", "import stitch.surprise", "stitch.surprise has no place in LAYERS"),
        ("stitch.surprise", "", "stitch.surprise has no place in LAYERS"),
        ("stitch.codegen.lower", "import stitch.runtime.memory", "stitch.runtime.memory is not above"),
        ("stitch.codegen.surprise", "", "stitch.codegen.surprise has no place in LAYERS"),
        ("stitch.simplify.sinking", "from stitch.simplify import simplify", "stitch.simplify is not above"),
        ("stitch.codegen.lower", "import codegen.loops", "it is stitch.codegen"),
        ("stitch.codegen.lower", "from .loops import For", "write it absolutely"),
        ("stitch.runtime.memory", "from stitch.codegen.loops import For", "stitch.runtime sees only"),
        ("stitch.runtime.cpu", "from stitch.dims import Dim", "stitch.runtime sees only"),
        ("stitch.runtime.cpu", "from stitch.ops import host", None),
        ("stitch.ops.host", "from stitch.dtypes import INT64", "stitch.ops.host sees only itself"),
        ("stitch.plan", "if TYPE_CHECKING:\n import stitch.runtime.cpu", "stitch.runtime.cpu is not above"),
        ("stitch.runtime.cpu", "from stitch.plan import Artifact\nimport stitch.runtime.memory", None),
        ("stitch.cli", "from stitch.codegen.llvm import emit\nfrom stitch import api, plan", None),
        ("stitch.graph", "def f():\n    from onnx import numpy_helper", "onnx only in"),
        ("stitch.backend", "import onnx.backend.base", None),
        ("stitch.graph", "import sympy as sp", "sympy only in stitch.dims.factors"),
        ("stitch.graph", "importlib.import_module('llvmlite.ir')", "llvmlite only in"),
        ("stitch.runtime.cpu", "import llvmlite.binding", None),
    ],
)
def test_the_check_itself(name: str, source: str, complaint: str | None) -> None:
    known = {"stitch.ops.matrix", "stitch.surprise"}
    wrong = breaches(Module(name, ast.parse(source), ROOT / "sample.py"), known)
    if complaint is None:
        assert wrong == []
    else:
        assert any(complaint in line for line in wrong), wrong


def test_every_package_is_installed() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(m.name for m in MODULES.values() if m.path.name == "__init__.py")


def run(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_importing_stitch_is_cheap() -> None:
    program = """
import os, sys, threading
before = set(sys.modules)
import stitch
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"numpy", "onnx", "sympy", "llvmlite", "ml_dtypes"}), threading.active_count())
if os.path.isdir("/proc/self/task"):
    assert len(os.listdir("/proc/self/task")) == 1
"""
    found = run(program)
    assert (found.stdout, found.stderr) == ("[] 1\n", "")


@pytest.mark.parametrize("name", ["codegen", "runtime"])
def test_folders_have_one_import_name(name: str) -> None:
    found = run(f"import stitch.{name}; import {name}")
    assert found.stderr.endswith(f"ImportError: import stitch.{name}, not {name}\n")


def test_unknown_attributes_are_attribute_errors() -> None:
    import stitch

    assert stitch.errors.StitchError.__module__ == "stitch.errors"
    assert not hasattr(stitch, "surprise")
