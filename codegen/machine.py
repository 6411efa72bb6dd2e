"""From LLVM text to object code.

No pass of LLVM's runs before its code generator: the text is vector code with invariants hoisted and equal expressions
shared already. Measured on a Zen 4 core, for the residual + layer norm + erf-GELU kernel of 1024 x 768 (350 lines):

    passes before               level 0            level 1             level 2
    none                        3.6 ms   670 us    13.0 ms   535 us    13.5 ms   535 us
    sroa, instcombine, cfg      4.2 ms   675 us    14.1 ms   532 us    14.9 ms   537 us
    new gvn                     4.6 ms   674 us    13.9 ms   538 us    14.8 ms   537 us

(time to compile, and to run: passes change nothing but the former.) Level 1, of the code generator, is the default.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal

import llvmlite.binding as llvm

from stitch.target import Target, from_host

Level = Literal[0, 1, 2, 3]
_lock = threading.Lock()
_ready = False


def _initialise() -> None:
    """All of LLVM's targets, so that code for other machines can be made and read."""
    global _ready
    with _lock:
        if not _ready:
            llvm.initialize_all_targets()
            llvm.initialize_all_asmprinters()
            _ready = True


def host() -> Target:
    """This machine, with the features that LLVM finds."""
    _initialise()
    return from_host(llvm.get_process_triple(), llvm.get_host_cpu_name(), dict(llvm.get_host_cpu_features()))


def compile(text: str, target: Target, level: Level = 1) -> bytes:
    """The object code of a module: position independent, ready to be linked by LLJIT or by a linker."""
    machine = _machine(target, level)
    code: bytes = machine.emit_object(_parsed(text, machine))
    return code


def assembly(text: str, target: Target, level: Level = 1) -> str:
    """What `compile` makes, for people and for tests."""
    machine = _machine(target, level)
    code: str = machine.emit_assembly(_parsed(text, machine))
    return code


def dump(text: str, target: Target, path: Path, level: Level = 1) -> None:
    """Writes path.ll and path.s, for reading."""
    path.with_suffix(".ll").write_text(text)
    path.with_suffix(".s").write_text(assembly(text, target, level))


def _machine(target: Target, level: Level) -> llvm.TargetMachine:
    _initialise()
    features = ",".join(target.features)
    found = llvm.Target.from_triple(target.triple)
    return found.create_target_machine(target.cpu, features, level, reloc="pic", codemodel="small", jit=True)


def _parsed(text: str, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    module = llvm.parse_assembly(text, llvm.create_context())
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    module.verify()
    return module
