"""How Python starts an inference: builtin functions of Python, written in LLVM IR as others are in C.

    call = caller(support, record)                     call([x], [y]) examines the arrays, and runs
    call = bound_caller(support, record, outputs, ...)  call() runs, and returns `outputs`

A call through ctypes would convert its arguments and find its way anew each time, for 0.2 us; these take a few tens of
nanoseconds, most of them for the interpreter's lock, which nobody holds during a run.

A record is a row of i64s that says all about the run:

    entry, team, dims, slots, arena, type of arrays, number of inputs, number of outputs, in use,
    then for each input, and each output: descr, rank, flags that must be set, address of the shape

`caller` is for a record that one run uses at a time. It compares the arrays in two lists with what the record says, and
takes their addresses to `slots`, in a few nanoseconds each, where Python would need a microsecond. It knows how CPython
lists and numpy arrays lie in memory, which `cpu.reads_arrays` tries out before anyone relies on it. If the k-th of the
arrays is not as the record says, nothing runs and the result is -k; if the lists have other lengths, it is -1.

`bound_caller` is for a record whose slots are filled. Whoever calls it during a call waits, as the arena is the same,
and the outputs are. `in use` is read and written under the interpreter's lock, so a plain number will do. It holds the
generation of the process, which each fork advances: in the child nothing is in use, whatever was in the parent.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from stitch.runtime.memory import address_of

HEAD = 9  # i64s before the descriptions of arrays
ARRAY = 4  # i64s for each of them
ENTRY, TEAM, DIMS, SLOTS, ARENA, TYPE, INPUTS, OUTPUTS = range(8)
CONTIGUOUS, ALIGNED, WRITEABLE = 0x1, 0x100, 0x400  # numpy's flags

_Make = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)
FUNCTIONS = ("stitch_run", "stitch_caller", "stitch_bound_caller", "stitch_forked")

# In front of a builtin function's code stands its description, a PyMethodDef: name, function, how it takes arguments
# (128: a row of pointers and their number, 4: none), documentation. `self` is a tuple that begins with the record's
# address. All that is used of Python is in its stable interface, but for how lists lie in memory.
IR = """
declare ptr @PyCFunction_NewEx(ptr, ptr, ptr)
declare ptr @PyEval_SaveThread()
declare void @PyEval_RestoreThread(ptr)
declare ptr @PyLong_AsVoidPtr(ptr)
declare ptr @PyLong_FromLongLong(i64)
declare ptr @PyObject_CallFunction(ptr, ptr, ...)
declare ptr @PyTuple_GetItem(ptr, i64)
declare void @Py_IncRef(ptr)
declare i32 @usleep(i32)

@name = internal constant [5 x i8] c"call\\00"
@code = internal constant [2 x i8] c"L\\00"
@call_method = internal global {ptr, ptr, i32, ptr} {ptr @name, ptr @call, i32 128, ptr null}
@bound_method = internal global {ptr, ptr, i32, ptr} {ptr @name, ptr @bound_call, i32 4, ptr null}
@generation = internal global i64 1

define ptr @stitch_caller(ptr %self) {
  %function = call ptr @PyCFunction_NewEx(ptr @call_method, ptr %self, ptr null)
  ret ptr %function
}

define ptr @stitch_bound_caller(ptr %self) {
  %function = call ptr @PyCFunction_NewEx(ptr @bound_method, ptr %self, ptr null)
  ret ptr %function
}

define void @stitch_forked() {
  %old = load i64, ptr @generation
  %new = add i64 %old, 1
  store i64 %new, ptr @generation
  ret void
}

define internal ptr @record_of(ptr %self) {
  %number = call ptr @PyTuple_GetItem(ptr %self, i64 0)
  %record = call ptr @PyLong_AsVoidPtr(ptr %number)
  ret ptr %record
}

define internal ptr @call(ptr %self, ptr %arguments, i64 %count) {
  %record = call ptr @record_of(ptr %self)
  %inputs = load ptr, ptr %arguments
  %outputs_at = getelementptr ptr, ptr %arguments, i64 1
  %outputs = load ptr, ptr %outputs_at
  %odd = call i64 @take(ptr %record, ptr %inputs, ptr %outputs)
  %fits = icmp eq i64 %odd, 0
  br i1 %fits, label %go, label %wrong
wrong:
  %minus = call ptr @PyLong_FromLongLong(i64 %odd)
  ret ptr %minus
go:
  %thread = call ptr @PyEval_SaveThread()
  %code = call i64 @stitch_run(ptr %record)
  call void @PyEval_RestoreThread(ptr %thread)
  %result = call ptr @PyLong_FromLongLong(i64 %code)
  ret ptr %result
}

; `self` goes on with the result and the function that raises the exception for a code.
define internal ptr @bound_call(ptr %self, ptr %nothing) {
  %record = call ptr @record_of(ptr %self)
  %used_at = getelementptr i64, ptr %record, i64 8
  br label %look
look:
  %generation = load i64, ptr @generation
  %used = load i64, ptr %used_at
  %taken = icmp eq i64 %used, %generation
  br i1 %taken, label %wait, label %go
wait:
  %waiting = call ptr @PyEval_SaveThread()
  call i32 @usleep(i32 20)
  call void @PyEval_RestoreThread(ptr %waiting)
  br label %look
go:
  store i64 %generation, ptr %used_at
  %thread = call ptr @PyEval_SaveThread()
  %code = call i64 @stitch_run(ptr %record)
  call void @PyEval_RestoreThread(ptr %thread)
  store i64 0, ptr %used_at
  %good = icmp eq i64 %code, 0
  br i1 %good, label %give, label %fail
give:
  %outputs = call ptr @PyTuple_GetItem(ptr %self, i64 1)
  call void @Py_IncRef(ptr %outputs)
  ret ptr %outputs
fail:
  %failure = call ptr @PyTuple_GetItem(ptr %self, i64 2)
  %null = call ptr (ptr, ptr, ...) @PyObject_CallFunction(ptr %failure, ptr @code, i64 %code)
  ret ptr %null
}

; The entry of a record, inside the team's begin and end.
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

; The addresses of the arrays in two lists go to the slots; 0, or what is wrong.
define internal i64 @take(ptr %record, ptr %inputs, ptr %outputs) {
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
  %from = add i64 %words, 9
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
  ret i64 0
}
"""


def new_record(arrays: int) -> np.ndarray:
    """Zeros, with room for so many arrays."""
    return np.zeros(HEAD + ARRAY * arrays, np.int64)


def caller(support: Mapping[str, int], record: np.ndarray) -> Callable[[list[Any], list[Any]], int]:
    """Its result is the code of the run, or negative."""
    call: Callable[[list[Any], list[Any]], int] = _Make(support["stitch_caller"])((address_of(record), record))
    return call


def bound_caller(
    support: Mapping[str, int], record: np.ndarray, outputs: list[Any], fail: Callable[[int], object], *kept: object
) -> Callable[[], list[Any]]:
    """Its result is `outputs`; `fail(code)` must raise. It keeps alive what else is given."""
    self = address_of(record), outputs, fail, record, *kept
    call: Callable[[], list[Any]] = _Make(support["stitch_bound_caller"])(self)
    return call


def prepare_for_fork(support: Mapping[str, int]) -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=ctypes.CFUNCTYPE(None)(support["stitch_forked"]))
