"""Thread teams in memory of this process, and how many threads one should have. Their code is `stitch.runtime.team`."""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from stitch.runtime.shares import CPUS, cpu_bits
from stitch.runtime.team import ALIGNMENT, LIVE, MEMBER, MEMBERS
from stitch.target import cpu_quota


class Team:
    """A team of `size`, the calling thread included, in memory that lives as long as the process.

    `functions` are the addresses of FUNCTIONS. The address of a team never changes, not even over a fork.
    """

    def __init__(self, size: int, functions: Mapping[str, int]) -> None:
        self.size = size
        self._memory = ctypes.create_string_buffer(MEMBERS + MEMBER * size + ALIGNMENT)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._memory))  # threads outlive the interpreter's objects
        self._bits: list[ctypes.Array[ctypes.c_char]] = []  # of the CPUs of its members, read when they start
        self.address = -(-ctypes.addressof(self._memory) // ALIGNMENT) * ALIGNMENT
        self._init: Callable[[int, int], None]
        self._init = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(functions["stitch_team_init"])
        self._stop: Callable[[int], int]
        self._stop = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(functions["stitch_team_stop"])
        self._reset()
        os.register_at_fork(after_in_child=self._reset)
        atexit.register(self.stop)

    def _reset(self) -> None:
        self._init(self.address, self.size)

    def place(self, cpus: Sequence[Collection[int]]) -> None:
        """Members run on these CPUs from when they are started on; without any, where the caller may who starts them.

        The caller of a region is member 0, whom nobody moves."""
        assert not self.workers, "only before its threads are started"
        self._bits = [ctypes.create_string_buffer(cpu_bits(some)) for some in cpus]
        for member in range(self.size):
            at = ctypes.addressof(self._bits[member]) if cpus else 0
            ctypes.c_void_p.from_address(self.address + MEMBERS + member * MEMBER + CPUS).value = at

    @property
    def workers(self) -> int:
        """How many threads it has started that are alive, besides callers."""
        return ctypes.c_int64.from_address(self.address + LIVE).value

    def stop(self, patience: float = 1.0) -> None:
        """End the workers; the team then runs everything on the caller. A region in progress is finished."""
        deadline = time.monotonic() + patience
        while self._stop(self.address) > 0 and time.monotonic() < deadline:
            time.sleep(0.0002)

    def restart(self) -> bool:
        """After `stop`: as it was when it was made. False, and no change, if workers are still there."""
        if self.workers:
            return False
        self._reset()
        return True


def available_cores(root: Path = Path("/")) -> int:
    """How many threads may run at once: the processors this process may use, cut to its cgroup's quota.

    A quota of 2.5 processors gives 2: a third thread would use up the quota early in each period, and
    all of them would be stopped for the rest of it.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root / "sys/fs/cgroup", root / "proc/self/cgroup")
    return max(1, math.floor(min(allowed, quota)))
