"""The text form of loop programs: stable, for people, for tests, and to find equal programs by."""

from __future__ import annotations

from stitch.access import Variable
from stitch.codegen.loops import (
    Apply,
    Axis,
    Buffer,
    Clip,
    Contract,
    Define,
    Expr,
    Gate,
    Guarded,
    Index,
    Literal,
    Lookup,
    Loop,
    Position,
    Prefetch,
    Program,
    Read,
    Stmt,
    Store,
    Transpose,
    Use,
    children,
    expressions,
    walk,
)

LONG = 160
"""Characters from which an expression is not written out a second time: shared ones would grow without end."""


def render(program: Program) -> str:
    """The stable text form. Names are made unique in order of appearance."""
    printer = _Printer(_shared(program))
    head = ", ".join(f"{printer.name(b)}: {b.dtype.name}[{b.size}]" for b in program.buffers)
    lines = [f"program {program.name}({head})"]
    lines += [f"  tile {printer.name(b)}: {b.dtype.name}[{b.size}]" for b in program.tiles]
    for phase in program.phases:
        axes = ", ".join(f"{printer.name(a)} < {a.extent}" for a in phase.axes)
        lines.append(f"  parallel ({axes}) grain {phase.grain}")
        lines += printer.body(phase.body, 2)
    return "\n".join(lines) + "\n"


def _shared(program: Program) -> set[int]:
    seen: set[int] = set()
    again: set[int] = set()
    stack = [e for p in program.phases for s in walk(p.body) for e in expressions(s)]
    while stack:
        e = stack.pop()
        if id(e) in seen:
            again.add(id(e))
        else:
            seen.add(id(e))
            stack.extend(children(e))
    return again


class _Printer:
    def __init__(self, shared: set[int]) -> None:
        self.names: dict[object, str] = {}
        self.used: dict[str, int] = {}
        self.written: dict[int, str] = {}
        self.shared = shared  # ids of expressions that occur more than once

    def name(self, x: Variable | Buffer) -> str:
        if x not in self.names:
            n = self.used.get(x.name, 0)
            self.used[x.name] = n + 1
            self.names[x] = x.name if n == 0 else f"{x.name}'{n}"
        return self.names[x]

    def body(self, body: tuple[Stmt, ...], depth: int) -> list[str]:
        lines: list[str] = []
        pad = "  " * depth
        for s in body:
            match s:
                case Loop():
                    word = "vector" if s.mode == "vector" else "for"
                    times = f" x{s.unroll}" if s.unroll > 1 else ""
                    lines.append(f"{pad}{word}{times} {self.name(s.axis)} < {self.extent(s.axis, s.clip)}")
                    lines += self.body(s.body, depth + 1)
                    for f in s.folds:
                        lines.append(f"{pad}  {self.name(f.local)} {f.op}= {self.expr(f.value)}")
                case Define():
                    lines.append(f"{pad}{self.name(s.local)} = {self.expr(s.value)}")
                case Store():
                    lines.append(f"{pad}{self.name(s.buffer)}[{self.index(s.index)}] := {self.expr(s.value)}")
                case Contract():
                    loops = ", ".join(f"{k.extent}:{k.a_stride}:{k.b_stride}" for k in s.loops)
                    lines.append(
                        f"{pad}{self.name(s.tile)}[{self.corner(s)}{s.rows}, {s.vectors}*W] := "
                        f"{self.name(s.a)}[{self.index(s.a_index)} + {s.a_row}*row] . "
                        f"{self.name(s.b)}[{self.index(s.b_index)} + lane] over {loops}"
                    )
                case Transpose():
                    sizes = f"{self.extent(s.rows, s.row_clip)}, {self.extent(s.columns, s.column_clip)}"
                    lines.append(
                        f"{pad}{self.name(s.to)}[{self.index(s.to_index)} + {s.to_step}*row + column] := "
                        f"{self.name(s.source)}[{self.index(s.index)} + {s.step}*column + row] over {sizes}"
                    )
                case Prefetch():
                    lines.append(f"{pad}prefetch {self.name(s.buffer)}[{self.index(s.index)}]")
        return lines

    def corner(self, s: Contract) -> str:
        return "" if s.tile_row is None else f"{self.index(s.tile_index)} + {s.tile_row}*row; "

    def extent(self, axis: Axis, clip: Clip | Gate | None) -> str:
        match clip:
            case Clip():
                return f"min({clip.block}, {clip.limit} - {clip.block}*{self.name(clip.outer)})"
            case Gate():
                tests = ", ".join(f"0 <= {self.index(b.index)} < {b.limit}" for b in clip.bounds)
                return f"{axis.extent} {'unless' if clip.without else 'if'} {tests}"
            case _:
                return f"{axis.extent}"

    def index(self, i: Index) -> str:
        parts = [f"{self.name(v)}" if c == 1 else f"({c})*{self.name(v)}" for v, c in i.terms]
        if i.offset != 0 or not parts:
            parts.append(str(i.offset))
        return " + ".join(parts)

    def expr(self, e: Expr) -> str:
        """A long expression that comes again is written once, with a number by which it goes from then on."""
        if id(e) in self.written:
            return self.written[id(e)]
        text = self._expr(e)
        if id(e) in self.shared and len(text) > LONG:
            self.written[id(e)] = f"#{len(self.written)}"
            return f"{text} as #{len(self.written) - 1}"
        return text

    def _expr(self, e: Expr) -> str:
        match e:
            case Literal():
                return f"{e.value}"
            case Read():
                return f"{self.name(e.buffer)}[{self.index(e.index)}]"
            case Use():
                return self.name(e.local)
            case Position():
                return f"<{self.index(e.index)}>"
            case Apply():
                kind = f".{(e.rounded or e.dtype).name}" if e.prim in ("cast", "bitcast") else ""
                kind += "" if e.most is None else f".at_most_{e.most:g}"
                return f"{e.prim}{kind}({', '.join(self.expr(a) for a in e.args)})"
            case Lookup():
                return f"{e.dtype.name}[{bytes(e.table).hex()}][{self.expr(e.at)}]"
            case Guarded():
                bounds = ", ".join(f"0 <= {self.index(b.index)} < {b.limit}" for b in e.bounds)
                return f"({self.expr(e.value)} if {bounds} else {e.otherwise.value})"
