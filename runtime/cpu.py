"""Machine code on the processor this runs on: the only module of the runtime that knows llvmlite.

`Library` loads object code. `support` is the code that comes with the runtime itself, compiled once per machine and
kept in the cache: the thread team (`threads`), and how an inference is started (`calls`).
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numpy as np

from stitch import knobs
from stitch.errors import ResourceError
from stitch.runtime import calls, threads
from stitch.runtime import team as team_code
from stitch.runtime.cache import Cache


@dataclass(frozen=True)
class Host:
    """What LLVM says about this machine."""

    triple: str
    cpu: str
    features: Mapping[str, bool]


def host() -> Host:
    features = dict(sorted(llvm.get_host_cpu_features().items()))
    return Host(llvm.get_process_triple(), llvm.get_host_cpu_name(), features)


class Library:
    """Object code that is loaded and linked. It calls functions of this process and those in `imports`."""

    def __init__(self, code: bytes, exports: list[str], imports: Mapping[str, int] | None = None) -> None:
        builder = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
        for name, address in (imports or {}).items():
            builder.import_symbol(name, address)
        for name in exports:
            builder.export_symbol(name)
        try:
            self._tracker = builder.link(_jit(), f"stitch{next(_numbers)}")
        except RuntimeError as error:
            raise ResourceError("code", f"the compiled code could not be loaded: {error}") from error

    def __getitem__(self, name: str) -> int:
        """The address of an export."""
        address: int = self._tracker[name]
        return address

    def keep(self) -> None:
        """Never unload it."""
        self._tracker._owned = True  # llvmlite's word for: by somebody else

    def close(self) -> None:
        """Give the memory back, which otherwise happens when nobody refers to the library any more.

        At exit llvmlite leaves everything in place: daemon threads may be inside.
        """
        self._tracker.close()


def compile_ir(text: str) -> bytes:
    """Object code, for any processor of this machine's architecture."""
    _initialise()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    machine = target.create_target_machine(opt=2, reloc="pic", codemodel="small", jit=True)
    module = llvm.parse_assembly(text)
    module.verify()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(2))
    builder.getModulePassManager().run(module, builder)
    code: bytes = machine.emit_object(module)
    return code


def support() -> Mapping[str, int]:
    """The addresses of the runtime's own functions. They are never unloaded, for threads may be inside."""
    global _support
    if _support is None:
        names = [*team_code.FUNCTIONS, *calls.FUNCTIONS]
        library = Library(_support_code(), names)
        library.keep()
        _support = {name: library[name] for name in names}
        calls.prepare_for_fork(_support)
    return _support


def _support_code() -> bytes:
    text = team_code.ir(llvm.get_process_triple()) + calls.IR
    key = hashlib.sha256(f"{llvmlite.__version__}\n{text}".encode()).hexdigest()
    cache = Cache(knobs.current().cache_dir, knobs.current().cache_bytes)
    code = cache.load_bytes(key)
    if code is None:
        code = compile_ir(text)
        cache.store_bytes(key, code)
    return code


def team(size: int) -> threads.Team | None:
    """The process's team of that size. None for 1: there is nothing to share out."""
    if size <= 1:
        return None
    if size not in _teams:
        _teams.setdefault(size, threads.Team(size, support()))
    return _teams[size]


def own_team(size: int, cpus: Sequence[Collection[int]] = ()) -> threads.Team | None:
    """A team that nobody else uses, until it is given back. Its workers run on the `cpus` of each member; without
    these, where the thread may that first shares out work to it. None for 1."""
    if size <= 1:
        return None
    idle = _idle.setdefault(size, [])
    team = idle.pop() if idle else threads.Team(size, support())
    team.place(cpus)
    return team


def give_back(team: threads.Team) -> None:
    """End the workers of an own team, through which no run may be going on."""
    team.stop()
    if team.restart():
        _idle[team.size].append(team)


def reads_arrays() -> bool:
    """Whether `calls` finds what it expects in lists and arrays here."""
    global _reads
    if _reads is None:
        _reads = _try_reading()
    return _reads


def _try_reading() -> bool:
    if platform.python_implementation() != "CPython" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    if sys.flags.gil == 0 if hasattr(sys.flags, "gil") else False:
        return False  # without the lock, objects have another head

    def word(address: int) -> int:
        return ctypes.c_int64.from_address(address).value

    def half(address: int) -> int:
        return ctypes.c_int32.from_address(address).value

    if list.__basicsize__ < 32 or np.ndarray.__basicsize__ < 72 or sys.byteorder != "little":
        return False
    for array in (np.zeros((3, 5, 7), np.float32)[1:], np.zeros(4, np.int8)[::2], np.array(1.0)):
        array.flags.writeable = array.ndim > 0
        items = [array, array]
        flags = half(id(array) + 64)
        found = [word(id(items) + 8), word(id(items) + 16), word(word(id(items) + 24) + 8)]
        found += [word(id(array) + 8), word(id(array) + 16), half(id(array) + 24), word(id(array) + 56)]
        expected = [id(list), 2, id(array), id(np.ndarray), array.ctypes.data, array.ndim, id(array.dtype)]
        found += [word(word(id(array) + 32) + 8 * axis) for axis in range(array.ndim)]
        expected += array.shape
        found += [bool(flags & bit) for bit in (calls.CONTIGUOUS, calls.ALIGNED, calls.WRITEABLE)]
        expected += [array.flags.c_contiguous, array.flags.aligned, array.flags.writeable]
        if found != expected:
            return False
    return True


def _initialise() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def _jit() -> Any:
    global _lljit
    with _lock:
        if _lljit is None:
            _initialise()
            # JITLink gives back all memory of a library that is unloaded; the older linker does not.
            _lljit = llvm.create_lljit_compiler(use_jit_link=True, suppress_errors=True)
            _lljit._owned = True  # never disposed of: threads may be inside at exit
    return _lljit


_lljit: Any = None
_support: Mapping[str, int] | None = None
_teams: dict[int, threads.Team] = {}
_idle: dict[int, list[threads.Team]] = {}  # own teams that were given back; memory of a team is never freed
_reads: bool | None = None
_numbers = count()
_lock = threading.Lock()
