"""What `explain()` gives: the report of a compiled model, as text for people and as a dict for programs.

    print(model.explain())                          bytes as expressions of the model's symbols
    print(model.explain().at(batch=1, seq=128))     as numbers, with each kernel's share
    print(model.explain().kernel("k10"))            one kernel: its nodes, and how values pass between them
    model.explain().to_dict()

`stitch.report` makes the report at compile time. A model that comes from the cache needs only this module.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from stitch import peak
from stitch.errors import StitchError

SCHEMES: Mapping[str, str] = {
    "independent": "no element of one depends on the other: side by side in one kernel",
    "local": "one to one: the value stays in a register, or in the tile of a matmul or convolution",
    "regional": "one to many: the value stays in the worker's registers or scratch memory",
    "global": "any: the value goes through memory, with a barrier inside the kernel",
}
"""The four stitching schemes, by the element dependency between a writer and a reader in one kernel."""

REASONS: Mapping[str, str] = {
    # why a kernel is what it is
    "stitched": "memory-bound operators joined by data flow",
    "heavy": "a matmul or convolution, with the elementwise operators behind it that see its result one to one",
    "alone": "one operator: nothing that it reads, or that reads it, could join it",
    "opaque": "stores where data says (scatter), so nothing joins it",
    "global": "a reader needs more of a value than one task makes: memory and a barrier between them",
    "chained": "a matmul and what is made of its rows, or for them: a task takes some rows through all of it",
    "over-budget": "a tile would not fit the cache budget, so it is a buffer",
    # why two kernels are not one
    "operand": "the reader is a matmul or convolution, which reads its operands from memory",
    "epilogue": "the reader stands behind another matmul or convolution, and reads this beside its result",
    "tail": "the writer is a matmul or convolution, and the reader does not see its result one to one",
    "cycle": "joined, they would wait for a third kernel that waits for them",
    "beside-opaque": "one of them is a scatter or runs on the host",
    "switched-off": "the scheme that would join them is excluded by the knob `schemes`",
    # why a node runs on the host
    "data-dependent": "the shape of its result depends on data: it runs in numpy",
    "host-only": "there is no native code for it: it runs in numpy",
    # why a node is in no kernel
    "constant": "its result follows from constants and shapes alone: nothing is computed when the model runs",
    "vanished": "nothing is left of it: no output needs it, it changes nothing, or another node makes it redundant",
}
"""The closed set of reason codes, and what each means."""


SUPPOSED = 64
"""What a symbol is taken to be where memory is to be a number, before the first run."""

SHORT = 160
"""Characters of an expression that are shown; `to_dict` has all of it."""


class Explanation:
    """What was stitched, why, what was not, why not."""

    def __init__(
        self,
        report: Mapping[str, Any],
        sizes: Mapping[str, int] | None = None,
        last: Mapping[str, int] | None = None,
    ) -> None:
        """`sizes` are put in for symbols; `last`, those of the last run, only where memory is to be a number."""
        text = report.get("explain", "")
        self._report: dict[str, Any] = json.loads(text) if text else dict(_EMPTY)
        self._memory: dict[str, Any] | None = json.loads(report["memory"]) if "memory" in report else None
        self._sizes = dict(sizes or {})
        self._last = dict(last or {})
        if self._sizes:
            self._apply_sizes()

    def at(self, **sizes: int) -> Explanation:
        """The same with numbers for symbols. Raises StitchError for a name that is no symbol of the model."""
        report = {"explain": json.dumps(self._report)}
        if self._memory is not None:
            report["memory"] = json.dumps(self._memory)
        return Explanation(report, {**self._sizes, **sizes}, self._last)

    def to_dict(self) -> dict[str, Any]:
        """`kernels`, `clusters` (nodes; edges with scheme; reasons), `boundaries`, `native_nodes`, `host_nodes`,
        `folded_nodes`, `bytes`, `memory` and `symbols`. Bytes are ints, or the text of an expression over the symbols.

        `memory`: bytes of the weights (`packed`, `as_they_are`); for each native step, its `arena`, the `scratch` of a
        thread, and its values, from phase `first` to phase `last`; and the `peak`, None unless all sizes are known: see
        `stitch.peak.Peak`."""
        found = dict(self._report)
        if self._memory is not None:
            now = peak.peak(self._memory)
            found["memory"] = {**self._memory, "peak": None if now is None else now.to_dict()}
        copy: dict[str, Any] = json.loads(json.dumps(found))
        return copy

    def kernel(self, name: str) -> str:
        """One kernel in detail. Raises StitchError if there is none of that name."""
        pairs = zip(self._report["kernels"], self._report["clusters"], strict=True)
        found = [(k, c) for k, c in pairs if k["name"] == name]
        if not found:
            raise StitchError(f"there is no kernel {name!r}", advice=f"they are {_range(self._report['kernels'])}")
        k, c = found[0]
        lines = [f"kernel {name}: {_operators(k)}", *(f"  {x}: {REASONS.get(x, '')}" for x in c["reasons"])]
        lines.append(f"  {_count(k['phases'], 'phase')}, {_count(k['groups'], 'group')}")
        lines.append(f"  reads {_bytes(k['read'])}, writes {_bytes(k['written'])}, constants {_bytes(k['constants'])}")
        lines += ["", "  nodes", *(f"    [{i}] {n}" for i, n in enumerate(c["nodes"], 1))]
        if c["edges"]:
            numbers = {n: i for i, n in enumerate(c["nodes"], 1)}
            rows = [(_numbered(e["from"], numbers), _numbered(e["to"], numbers), e) for e in c["edges"]]
            widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
            lines += ["", "  values that pass between its operations"]
            lines += [
                f"    {a:{widths[0]}} -> {b:{widths[1]}}  {e['scheme']}" + (f", {e['place']}" if e["place"] else "")
                for a, b, e in rows
            ]
        around = [b for b in self._report["boundaries"] if name in (b["from"], b["to"])]
        if around:
            lines += ["", "  values that pass between kernels, and why"]
            lines += [f"    {b['from']} -> {b['to']}  {_bytes(b['bytes'])}  {b['reason']}" for b in around]
            lines += [f"  {code}: {REASONS[code]}" for code in dict.fromkeys(b["reason"] for b in around)]
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join([*self._header(), *self._needs(), "", *self._table(), "", *self._legend()])

    # -------------------------------------------------- parts of the text

    def _header(self) -> list[str]:
        r = self._report
        native, host, folded = len(r["native_nodes"]), len(r["host_nodes"]), len(r["folded_nodes"])
        edges = Counter(e["scheme"] for c in r["clusters"] for e in c["edges"])
        walked, single = r["bytes"]["walked"], r["bytes"]["one_by_one"]
        saved = ""
        if isinstance(walked, int) and isinstance(single, int) and single:
            saved = f"; stitching saves {100 * (single - walked) / single:.0f} % of that"
        lines = [
            f"{_count(native + host + folded, 'ONNX node')}: {native} in {_count(len(r['kernels']), 'kernel')}, "
            f"{host} on the host, {folded} folded away",
            "stitched by scheme: " + (", ".join(f"{edges[s]} {s}" for s in SCHEMES if edges[s]) or "nothing"),
            "bytes of activations",
            f"  read and written: {_bytes(walked)}",
            f"  with a kernel for each ONNX node: {_bytes(single)}{saved}",
            f"  intermediates that are stored: {_bytes(r['bytes']['intermediate'])}",
        ]
        if self._sizes:
            lines.insert(0, "at " + ", ".join(f"{k}={v}" for k, v in self._sizes.items()))
        return lines

    def _needs(self) -> list[str]:
        """Memory beside inputs and outputs, in numbers if need be at sizes that are supposed."""
        m = self._memory
        if m is None:
            return []
        packed, other = (m["weights"][k] for k in ("packed", "as_they_are"))
        lines = [f"memory beside inputs and outputs\n  weights: {_bytes(packed)} packed, {_bytes(other)} as they are"]
        now, at = peak.peak(m), ""
        if now is None and m["steps"]:
            for s in m["steps"]:
                lines.append(f"  arena: {_short(s['arena'])}")
            names = sorted(_names(m))
            known = {n: self._last.get(n, SUPPOSED) for n in names}
            whence = "as in the last run" if all(n in self._last for n in names) else "say"
            at = f" at {', '.join(f'{n}={v}' for n, v in known.items())}, {whence}"
            now = peak.peak(peak.sized(m, lambda d: _sized(d, known)))
        if now is None:
            return lines
        saved = f", {_bytes(now.without_reuse)} if each value had a place of its own" if now.without_reuse else ""
        lines.append(f"  arena{at}: {_bytes(now.arena)}{saved}")
        if now.least:
            least = (
                f"  most that lives at once: {_bytes(now.least)}, the arena is {now.arena / now.least:.2f} times that"
            )
            lines.append(f"{least}; {_count(now.in_place, 'result')} in the place of an operand")
            held = ", ".join(f"{v} {_bytes(n)} ({a} to {b})" for v, n, a, b in now.held[:4])
            more = f", and {len(now.held) - 4} more" if len(now.held) > 4 else ""
            lines.append(f"  there, in {now.kernel}: {held}{more}")
        lines.append(f"  scratch: {_bytes(now.scratch)} for each thread")
        lines += [f"  for numpy: {f['value']} {_bytes(f['bytes'])}" for f in m.get("frames", ())]
        return lines

    def _table(self) -> list[str]:
        """One row for kernels that are alike."""
        total = self._report["bytes"]["walked"]
        alike: dict[tuple[Any, ...], list[str]] = {}
        for k, c in zip(self._report["kernels"], self._report["clusters"], strict=True):
            found = Counter(e["scheme"] for e in c["edges"])
            counts = tuple(str(found[s]) if found[s] else "-" for s in SCHEMES)
            key = (_operators(k), str(k["onnx"]), str(k["phases"]), *counts, k["bytes"])
            alike.setdefault(key, []).append(k["name"])
        head = ["kernel", "what it computes", "nodes", "phases", "indep.", "local", "regional", "global", "bytes"]
        rows = [head]
        for key, names in alike.items():
            size = key[-1]
            times = f" x{len(names)}" if len(names) > 1 else ""
            share = _share(size * len(names), total) if isinstance(size, int) else ""
            rows.append([names[0] + times, *key[:-1], f"{_bytes(size)}{' each' if times else ''}{share}"])
        unused = {i for i in range(4, 8) if all(row[i] == "-" for row in rows[1:])}
        rows = [[x for i, x in enumerate(row) if i not in unused] for row in rows]
        last = len(rows[0]) - 1
        widths = [max(len(row[i]) for row in rows) for i in range(last + 1)]
        left = (0, 1, last)
        styles = [f"{'<' if i in left else '>'}{w}" for i, w in enumerate(widths)]
        return ["  ".join(format(x, style) for x, style in zip(row, styles, strict=True)).rstrip() for row in rows]

    def _legend(self) -> list[str]:
        r = self._report
        lines = ["why the kernels are what they are"]
        lines += _codes(Counter(x for c in r["clusters"] for x in c["reasons"]), "kernel")
        if r["boundaries"]:
            lines += ["why they are not fewer"]
            lines += _codes(Counter(b["reason"] for b in r["boundaries"]), "value")
        if r["host_nodes"]:
            lines += ["on the host"]
            for h in r["host_nodes"]:
                lines.append(f"  {h['operator']} {h['node']!r}: {h['reason']}: {REASONS[h['reason']]}")
        if r["folded_nodes"]:
            lines += ["folded away"]
            lines += _codes(Counter(n["reason"] for n in r["folded_nodes"]), "node")
        return lines

    # -------------------------------------------------- sizes

    def _apply_sizes(self) -> None:
        r = self._report
        for name, value in self._sizes.items():
            if name not in r["symbols"]:
                known = ", ".join(map(repr, r["symbols"])) or "none"
                raise StitchError(f"the model has no symbol {name!r}", advice=f"its symbols are {known}")
            if value < 0:
                raise StitchError(f"{name} is {value}", advice="give 0 or more")
        r["bytes"] = {k: _sized(v, self._sizes) for k, v in r["bytes"].items()}
        for k in r["kernels"]:
            k.update({name: _sized(k[name], self._sizes) for name in ("bytes", "read", "written", "constants")})
        for b in r["boundaries"]:
            b["bytes"] = _sized(b["bytes"], self._sizes)
        if self._memory is not None:
            self._memory = peak.sized(self._memory, lambda d: _sized(d, self._sizes))


_EMPTY: Mapping[str, Any] = {
    "kernels": [], "clusters": [], "boundaries": [], "native_nodes": [], "host_nodes": [], "folded_nodes": [],
    "bytes": {"walked": 0, "intermediate": 0, "one_by_one": 0}, "symbols": [],
}  # fmt: skip


def _sized(size: int | str, sizes: Mapping[str, int]) -> int | str:
    from stitch import dims

    if isinstance(size, int):
        return size
    result = dims.substitute(dims.parse(size), sizes)
    return result if isinstance(result, int) else str(result)


def _names(memory: Mapping[str, Any]) -> set[str]:
    """The symbols that sizes in a record of memory depend on."""
    from stitch import dims

    texts = {x for s in memory["steps"] for x in (s["arena"], s["scratch"], *(v["bytes"] for v in s["values"]))}
    found = [dims.parse(t) for t in texts if isinstance(t, str)]
    return {s for d in found for s in dims.symbols(d)}


def _short(size: int | str) -> str:
    text = _bytes(size)
    return text if len(text) <= SHORT else f"{text[:SHORT]} ..."


def _operators(kernel: Mapping[str, Any]) -> str:
    """The dominant operators first, then what hangs on them."""
    first = Counter(kernel["dominants"])
    rest = Counter(kernel["operators"]) - first
    heads = ", ".join(_times(n, op) for op, n in first.items())
    tail = ", ".join(_times(n, op) for op, n in rest.items())
    return f"{heads} + {tail}" if heads and tail else heads or tail or "copy"


def _numbered(step: str, numbers: Mapping[str, int]) -> str:
    """`exp (Softmax 'x')` with the number of the node instead."""
    prim, _, node = step.partition(" ")
    number = numbers.get(node[1:-1])
    return f"{prim} [{number}]" if number else prim


def _times(n: int, operator: str) -> str:
    return f"{n} {operator}" if n > 1 else operator


def _codes(counts: Mapping[str, int], what: str) -> list[str]:
    ordered = [(code, counts[code]) for code in REASONS if counts.get(code)]
    width = max((len(f"{code} ({_count(n, what)})") for code, n in ordered), default=0)
    return [f"  {f'{code} ({_count(n, what)})':{width}}  {REASONS[code]}" for code, n in ordered]


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _bytes(size: int | str) -> str:
    if isinstance(size, str):
        return size
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}" if size < 100 * scale else f"{size / scale:.0f} {unit}"
    return f"{size} B"


def _share(part: int, whole: int | str) -> str:
    return f" ({100 * part / whole:.0f} %)" if isinstance(whole, int) and whole else ""


def _range(kernels: Sequence[Mapping[str, Any]]) -> str:
    names = [k["name"] for k in kernels]
    return ", ".join(names) if len(names) < 6 else f"{names[0]} to {names[-1]}"
