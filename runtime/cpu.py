"""Machine code on the processor this runs on: the only module of the runtime that knows llvmlite.

`Library` loads object code. `support` is the code that comes with the runtime itself, compiled once per machine and
kept in the cache: the thread team, and two functions that start an inference,

    i64 stitch_run(ptr record)                                the entry of `record`, inside the team's begin and end
    i64 stitch_call(ptr record, ptr inputs, ptr outputs)      the same with two Python lists of numpy arrays

`stitch_call` examines the arrays and takes their addresses in a few nanoseconds each, where Python would need a
microsecond. It knows how CPython lists and numpy arrays lie in memory; `reads_arrays` tries that out, once, before
anyone relies on it. A record is a row of i64s:

    entry, team, dims, slots, arena, type of arrays, number of inputs, number of outputs,
    then for each input, and each output: descr, rank, flags that must be set, address of the shape

The array's addresses go to `slots`. If the k-th of the arrays is not as the record says, nothing runs and the result
is -k; if the lists have other lengths, it is -1.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numpy as np

from stitch import knobs
from stitch.errors import ResourceError
from stitch.runtime import threads
from stitch.runtime.cache import Cache

RECORD_HEAD = 8  # i64s before the descriptions of arrays
RECORD_ARRAY = 4  # i64s for each of them
CONTIGUOUS, ALIGNED, WRITEABLE = 0x1, 0x100, 0x400  # numpy's flags

_CALL_IR = """
define i64 @stitch_run(ptr %record) {
  %entry = load ptr, ptr %record
  %team_at = getelementptr i64, ptr %record, i64 1
  %team = load ptr, ptr %team_at
  %dims_at = getelementptr i64, ptr %record, i64 2
  %dims = load ptr, ptr %dims_at
  %slots_at = getelementptr i64, ptr %record, i64 3
  %slots = load ptr, ptr %slots_at
  %arena_at = getelementptr i64, ptr %record, i64 4
  %arena = load ptr, ptr %arena_at
  %nobody = icmp eq ptr %team, null
  br i1 %nobody, label %alone, label %together
alone:
  %code = call i64 %entry(ptr null, ptr %dims, ptr %slots, ptr %arena)
  ret i64 %code
together:
  call void @stitch_team_begin(ptr %team)
  %code2 = call i64 %entry(ptr %team, ptr %dims, ptr %slots, ptr %arena)
  call void @stitch_team_end(ptr %team)
  ret i64 %code2
}

define i64 @stitch_call(ptr %record, ptr %inputs, ptr %outputs) {
begin:
  %slots_at = getelementptr i64, ptr %record, i64 3
  %slots = load ptr, ptr %slots_at
  %type_at = getelementptr i64, ptr %record, i64 5
  %type = load i64, ptr %type_at
  %n_in_at = getelementptr i64, ptr %record, i64 6
  %n_in = load i64, ptr %n_in_at
  %n_out_at = getelementptr i64, ptr %record, i64 7
  %n_out = load i64, ptr %n_out_at
  %n = add i64 %n_in, %n_out
  %given_in_at = getelementptr i64, ptr %inputs, i64 2
  %given_in = load i64, ptr %given_in_at
  %given_out_at = getelementptr i64, ptr %outputs, i64 2
  %given_out = load i64, ptr %given_out_at
  %in_ok = icmp eq i64 %given_in, %n_in
  %out_ok = icmp eq i64 %given_out, %n_out
  %lengths = and i1 %in_ok, %out_ok
  br i1 %lengths, label %start, label %odd
odd:
  ret i64 -1
start:
  %in_items_at = getelementptr i64, ptr %inputs, i64 3
  %in_items = load ptr, ptr %in_items_at
  %out_items_at = getelementptr i64, ptr %outputs, i64 3
  %out_items = load ptr, ptr %out_items_at
  br label %loop
loop:
  %i = phi i64 [0, %start], [%next, %fits]
  %more = icmp slt i64 %i, %n
  br i1 %more, label %look, label %go
look:
  %is_in = icmp slt i64 %i, %n_in
  %j = sub i64 %i, %n_in
  %in_at = getelementptr ptr, ptr %in_items, i64 %i
  %out_at = getelementptr ptr, ptr %out_items, i64 %j
  %item_at = select i1 %is_in, ptr %in_at, ptr %out_at
  %item = load ptr, ptr %item_at
  %words = mul i64 %i, 4
  %from = add i64 %words, 8
  %want = getelementptr i64, ptr %record, i64 %from
  %next = add i64 %i, 1
  %item_type_at = getelementptr i64, ptr %item, i64 1
  %item_type = load i64, ptr %item_type_at
  %is_array = icmp eq i64 %item_type, %type
  br i1 %is_array, label %array, label %wrong
array:
  %descr_at = getelementptr i8, ptr %item, i64 56
  %descr = load i64, ptr %descr_at
  %rank_at = getelementptr i8, ptr %item, i64 24
  %rank = load i32, ptr %rank_at
  %flags_at = getelementptr i8, ptr %item, i64 64
  %flags = load i32, ptr %flags_at
  %want_descr = load i64, ptr %want
  %want_rank_at = getelementptr i64, ptr %want, i64 1
  %want_rank = load i32, ptr %want_rank_at
  %want_flags_at = getelementptr i64, ptr %want, i64 2
  %want_flags = load i32, ptr %want_flags_at
  %descr_ok = icmp eq i64 %descr, %want_descr
  %rank_ok = icmp eq i32 %rank, %want_rank
  %set = and i32 %flags, %want_flags
  %flags_ok = icmp eq i32 %set, %want_flags
  %two = and i1 %descr_ok, %rank_ok
  %three = and i1 %two, %flags_ok
  br i1 %three, label %shape, label %wrong
shape:
  %dims_at = getelementptr i8, ptr %item, i64 32
  %dims = load ptr, ptr %dims_at
  %want_dims_at = getelementptr i64, ptr %want, i64 3
  %want_dims = load ptr, ptr %want_dims_at
  %axes = zext i32 %rank to i64
  br label %axis
axis:
  %a = phi i64 [0, %shape], [%a_next, %compare]
  %rest = icmp slt i64 %a, %axes
  br i1 %rest, label %compare, label %fits
compare:
  %dim_at = getelementptr i64, ptr %dims, i64 %a
  %dim = load i64, ptr %dim_at
  %want_dim_at = getelementptr i64, ptr %want_dims, i64 %a
  %want_dim = load i64, ptr %want_dim_at
  %a_next = add i64 %a, 1
  %dim_ok = icmp eq i64 %dim, %want_dim
  br i1 %dim_ok, label %axis, label %wrong
fits:
  %data_at = getelementptr i8, ptr %item, i64 16
  %data = load ptr, ptr %data_at
  %slot = getelementptr ptr, ptr %slots, i64 %i
  store ptr %data, ptr %slot
  br label %loop
wrong:
  %minus = sub i64 0, %next
  ret i64 %minus
go:
  %code = call i64 @stitch_run(ptr %record)
  ret i64 %code
}
"""


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
        names = [*threads.FUNCTIONS, "stitch_run", "stitch_call"]
        library = Library(_support_code(), names)
        library.keep()
        _support = {name: library[name] for name in names}
    return _support


def _support_code() -> bytes:
    text = threads.ir(llvm.get_process_triple()) + _CALL_IR
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


def reads_arrays() -> bool:
    """Whether `stitch_call` finds what it expects in lists and arrays here."""
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
        found += [bool(flags & bit) for bit in (CONTIGUOUS, ALIGNED, WRITEABLE)]
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
_reads: bool | None = None
_numbers = count()
_lock = threading.Lock()
