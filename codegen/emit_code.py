"""A function of LLVM text under construction: open loops, value numbering, and hoisting as code is written.

Each open loop is a *level* with the lines of its body so far; level 0 is the function's entry. An instruction without
side effects goes to the deepest level among its operands, and an equal one is never written twice. What is appended
to an outer level while an inner loop is open lands in the inner loop's preheader: so invariant code leaves loops, and
common subexpressions are found, without a pass of LLVM's.

Loads are treated alike, down to a floor: a load of a buffer does not leave the innermost loop that stores to it (nor
the loop over tasks), and a store forgets what was loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from stitch.codegen.loops import Buffer

TASK = 1  # the level of a task's body


@dataclass
class Level:
    label: str  # of the basic block that is being written
    lines: list[str] = field(default_factory=list)
    loads: dict[Buffer, dict[str, str]] = field(default_factory=dict)


class Writer:
    """Names of values are SSA names or literals; a literal is available everywhere."""

    def __init__(self) -> None:
        self.levels = [Level("entry")]
        self.depth: dict[str, int] = {}  # the level of every SSA name; a function's parameters and literals are at 0
        self.known: dict[str, str] = {}
        self.floors: dict[Buffer, int] = {}
        self.count = 0

    def _place(self, text: str, level: int) -> str:
        name = f"%v{self.count}"
        self.count += 1
        self.levels[level].lines.append(f"  {name} = {text}")
        self.depth[name] = level
        return name

    def level_of(self, names: Iterable[str]) -> int:
        depth = self.depth
        return max((depth.get(n, 0) for n in names), default=0)

    def pure(self, text: str, *operands: str) -> str:
        """The value of an instruction without side effects; `operands` are the names in `text`."""
        found = self.known.get(text)
        if found is None:
            depth = self.depth
            level = 0
            for n in operands:
                d = depth.get(n, 0)
                if d > level:
                    level = d
            found = self.known[text] = self._place(text, level)
        return found

    def load(self, buffer: Buffer, text: str, *operands: str) -> str:
        """The value of an instruction that reads `buffer`."""
        level = max(self.floors.get(buffer, TASK), self.level_of(operands))
        table = self.levels[level].loads.setdefault(buffer, {})
        if text not in table:
            table[text] = self._place(text, level)
        return table[text]

    def here(self, text: str) -> str:
        """The value of an instruction that is not to be moved."""
        return self._place(text, len(self.levels) - 1)

    def slot(self, kind: str) -> str:
        """Memory of the function's own for a value."""
        return self._place(f"alloca {kind}", 0)

    def table(self, words: Sequence[str]) -> str:
        """The address of these i64, which are known at the entry."""
        text = f"alloca [{len(words)} x i64] ; {' '.join(words)}"
        if text not in self.known:
            at = self.known[text] = self._place(text, 0)
            for k, word in enumerate(words):
                p = self.pure(f"getelementptr i64, ptr {at}, i64 {k}", at)
                self.levels[0].lines.append(f"  store i64 {word}, ptr {p}")
        return self.known[text]

    def effect(self, text: str, buffer: Buffer | None = None) -> None:
        """An instruction for its effect, on `buffer`, here and now."""
        self.levels[-1].lines.append(f"  {text}")
        if buffer is not None:
            for level in self.levels:
                level.loads.pop(buffer, None)

    def repeat(
        self,
        start: str | int,
        stop: str | int,
        step: int | str,
        carried: Sequence[tuple[str, str]],
        body: Callable[[str | int, list[str]], Sequence[str]],
        stored: Iterable[Buffer] = (),
        once: bool = False,
        opaque: bool = False,
        some: bool = False,
    ) -> list[str]:
        """A loop from `start` while below `stop`. `carried`: types and first values of what iterations hand on, which
        `body` gets with the position, and returns anew; the last ones are the result. A single iteration is written
        without a loop, and also with `once`, which promises that there is no second one, but for the test; `some`
        promises that there is a first one.

        `opaque` keeps LLVM's loop strength reduction from the position, unless the body multiplies it. Where addresses
        are the sum of a base and the position anyway, it takes a quarter of the time of code generation to make a
        pointer of each, which is carried from task to task as well, and then they do not fit into the registers."""
        first = [name for _, name in carried]
        if isinstance(start, int) and isinstance(stop, int):
            if start >= stop:
                return first
            if isinstance(step, int) and start + step >= stop:
                return list(body(start, first))
        n = self.count
        self.count += 1
        sure = some or (isinstance(start, int) and isinstance(stop, int))
        here = len(self.levels)
        position = f"%i{n}"
        names = [f"%c{n}.{k}" for k in range(len(carried))]
        self.levels.append(Level(f"loop{n}"))
        for name in (position, *names):
            self.depth[name] = here
        floors = self.floors
        self.floors = {**floors, **dict.fromkeys(stored, here)}
        results = body(position, names)
        self.floors = floors
        inner = self.levels.pop()
        outer = self.levels[-1]
        lines = outer.lines
        if sure:
            lines.append(f"  br label %loop{n}")
        else:
            lines.append(f"  %t{n} = icmp slt i64 {start}, {stop}")
            lines.append(f"  br i1 %t{n}, label %loop{n}, label %done{n}")
        lines.append(f"loop{n}:")
        again = ["" if once else f", [ {x}, %{inner.label} ]" for x in (f"%n{n}", *results)]
        opaque = opaque and not any(" mul " in line and position in re.split("[ ,]", line) for line in inner.lines)
        counter = f"%j{n}" if opaque else position
        lines.append(f"  {counter} = phi i64 [ {start}, %{outer.label} ]{again[0]}")
        for (kind, old), name, new in zip(carried, names, again[1:], strict=True):
            lines.append(f"  {name} = phi {kind} [ {old}, %{outer.label} ]{new}")
        if opaque:  # an expectation means nothing here, and leaves no trace in machine code
            lines.append(f"  {position} = call i64 @llvm.expect.i64(i64 {counter}, i64 0)")
        lines += inner.lines
        if once:
            lines.append(f"  br label %done{n}")
        else:
            lines.append(f"  %n{n} = add nuw nsw i64 {counter}, {step}")
            lines.append(f"  %r{n} = icmp slt i64 %n{n}, {stop}")
            lines.append(f"  br i1 %r{n}, label %loop{n}, label %done{n}")
        lines.append(f"done{n}:")
        final = []
        for k, ((kind, old), new) in enumerate(zip(carried, results, strict=True)):
            skipped = "" if sure else f", [ {old}, %{outer.label} ]"
            lines.append(f"  %e{n}.{k} = phi {kind} [ {new}, %{inner.label} ]{skipped}")
            self.depth[f"%e{n}.{k}"] = here - 1
            final.append(f"%e{n}.{k}")
        outer.label = f"done{n}"
        return final

    def text(self) -> str:
        """The finished body of the function."""
        assert len(self.levels) == 1
        return "\n".join(["entry:", *self.levels[0].lines, "  ret void"])
