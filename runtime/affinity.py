"""Which CPUs a thread may run on."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from stitch.errors import ResourceError

Cpus = frozenset[int]


def allowed() -> Cpus:
    """The CPUs of the calling thread."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def checked(cpus: Collection[int]) -> Cpus:
    """The CPUs as a set. Raises ResourceError if there are none, or some that the calling thread must not use."""
    here = allowed()
    listed = ", ".join(map(str, sorted(here)))
    if not cpus:
        raise ResourceError("cpus", "a set of CPUs is empty", f"this process may use {listed}")
    if missing := sorted(set(cpus) - here):
        which = f"CPUs {', '.join(map(str, missing))} are" if len(missing) > 1 else f"CPU {missing[0]} is"
        raise ResourceError("cpus", f"{which} not available to this process", f"it may use {listed}")
    return frozenset(cpus)


def pin(cpus: Cpus | None) -> None:
    """The calling thread, and those that it starts from now on, run on these CPUs. None, or a system without
    affinity: nothing happens. Raises ResourceError."""
    if cpus is None or not hasattr(os, "sched_setaffinity"):
        return
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as problem:
        raise ResourceError("cpus", f"no thread can be bound to CPUs {sorted(cpus)}: {problem}") from problem


@contextmanager
def restored(changes: bool) -> Iterator[None]:
    """The calling thread's CPUs are afterwards what they were, if they change at all."""
    before = allowed() if changes else None
    try:
        yield
    finally:
        pin(before)
