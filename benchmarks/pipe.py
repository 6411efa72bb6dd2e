"""Engines in processes of their own, and the pipe to them.

An engine shares nothing with the others: its threads, its allocator and its imports stay in its process, which may run
in another Python environment and may die. Messages and answers are pickles: a command with its arguments; whether it
went well, and the result or the reason.
"""

from __future__ import annotations

import os
import pickle
import select
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS = "stitch"
PATIENCE_S = 240  # for one answer: a compiler may be slow, but not that slow


class Failed(Exception):
    """What an engine answered instead of a result."""


class Process:
    """Our end of the pipe. `arguments` are those of the interpreter."""

    def __init__(self, python: str, arguments: Sequence[str], environ: Mapping[str, str]) -> None:
        self._command = [python, *arguments]
        self._environ = os.environ | environ
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, env=self._environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, *message: Any) -> Any:
        """The answer to a command. Raises Failed; a process that died, or does not answer, is replaced."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], PATIENCE_S)[0]:
                self._process.kill()
            good, answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = self._process.wait()
            self._start()
            raise Failed(f"the process ended with {code}") from None
        if not good:
            raise Failed(answer)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(handle: Callable[..., Any]) -> None:
    """The other end: answers commands from stdin on stdout, until there are no more."""
    answers, sys.stdout = os.fdopen(os.dup(1), "wb"), sys.stderr
    os.dup2(2, 1)  # what a library prints is no answer
    while True:
        try:
            command = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            good, answer = True, handle(*command)
        except Exception as problem:
            good, answer = False, told(problem)
        pickle.dump((good, answer), answers)
        answers.flush()


def told(problem: Exception) -> str:
    """The type and the first line that says something: one that announces another does not."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    first = next((line for line in lines if not line.endswith(":")), lines[0] if lines else "")
    return f"{type(problem).__name__}: {first[:150]}"


def processors(threads: int) -> set[int]:
    """The last ones of those that we may use: interrupts go to the first."""
    return set(sorted(os.sched_getaffinity(0))[-threads:])


def interpreter(engine: str, peers: str) -> str:
    """Ours for stitch, and that of the peers for all others."""
    return sys.executable if engine == OURS else peers


def default_peers() -> str:
    """Where `make bench-setup` installs the peers, or else this interpreter."""
    own = ROOT / ".venv-bench" / "bin" / "python"
    return str(own) if own.exists() else sys.executable
