"""From LLVM text to object code: the only module of the compiler, with `ptx`, that calls LLVM."""

from __future__ import annotations

import threading

import llvmlite.binding as llvm

from stitch.target import Target

PASSES = ("sroa", "early", "combine", "simplify")
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


def _machine(target: Target, level: int) -> llvm.TargetMachine:
    _initialise()
    found = llvm.Target.from_triple(target.triple)
    return found.create_target_machine(
        cpu=target.cpu, features=",".join(target.features), opt=level, reloc="pic", codemodel="small", jit=True
    )


def compile(text: str, target: Target, level: int = 1, passes: bool = False) -> bytes:
    """The object code of a module."""
    machine = _machine(target, level)
    module = _parsed(text, machine, passes)
    code: bytes = machine.emit_object(module)
    return code


def assembly(text: str, target: Target, level: int = 1, passes: bool = False) -> str:
    """The same as assembly, for people and for tests."""
    machine = _machine(target, level)
    code: str = machine.emit_assembly(_parsed(text, machine, passes))
    return code


def _parsed(text: str, machine: llvm.TargetMachine, passes: bool) -> llvm.ModuleRef:
    module = llvm.parse_assembly(text, llvm.create_context())
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    return module
