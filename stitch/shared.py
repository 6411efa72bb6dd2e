"""Phases of kernels that core sets share out: from what they do to what `stitch.placement.sharing` wants to know, and
from its shares to the tables by which a thread team deals its chunks (`stitch.runtime.shares`).

The chunks of a phase are ranges of its tasks, and tasks are points of its parallel axes, in row-major order: so what
is cut is the outermost of them. In a contraction that is a block of rows, or of columns, which are the output channels
of a convolution; in all else it is rows. What a window reaches beyond a share, the halo, is read from the memory that
all sets have in common.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from stitch import decision, dims
from stitch.codegen.kernels import Lowered
from stitch.codegen.loops import Contract, Phase, walk
from stitch.cost import Rates, Work
from stitch.placement import sharing
from stitch.placement.problem import Device, Link
from stitch.placement.sharing import Divisible, Share, Way
from stitch.runtime.shares import table

CHUNKS = 4
"""Chunks for each member that has to do with a phase, if the leader's set does it alone."""


@dataclass(frozen=True)
class Team:
    """How the phases of each kernel are run if the device `lead` has the help of the others; none: it has no help."""

    lead: int = 0
    kernels: Mapping[str, Sequence[tuple[Divisible, Share]]] = field(default_factory=dict)

    @staticmethod
    def of(
        lowered: Mapping[str, Lowered], work: Mapping[str, Sequence[Work]], devices: Sequence[Device],
        links: Sequence[Sequence[Link]], rates: Sequence[Rates], given: Sequence[float], sizes: Mapping[str, int],
        lead: int,
    ) -> Team:  # fmt: skip
        """`work` of each kernel's phases; `links` as `sharing.share` takes them; `rates` of each device, and the part
        of its time that it is `given`."""
        cores = [d.cores for d in devices]
        found = {}
        for name, phases in work.items():
            of = [
                divisible(w, way(p, sizes), rates, cores, given)
                for w, p in zip(phases, _phases(lowered, name), strict=True)
            ]
            found[name] = [(d, sharing.share(d, devices, links, lead)) for d in of]
        return Team(lead, found)

    def saved(self, kernel: str) -> float:
        """Seconds less than on the leader alone."""
        return math.fsum(of.alone[self.lead] - share.seconds for of, share in self.kernels.get(kernel, ()))

    def helpers(self, names: Collection[str]) -> list[int]:
        """Devices other than the leader that take part in some phase of these kernels."""
        rows = [share.pieces for name in names for _, share in self.kernels.get(name, ()) if share.shared]
        return sorted({d for pieces in rows for d, n in enumerate(pieces) if n and d != self.lead})

    def tables(self, names: Collection[str], members: Sequence[int]) -> dict[str, tuple[tuple[int, ...], ...]]:
        """For each phase of these kernels, how a team deals it that has so many `members` of each device, the leader's
        first. A device without members takes part in none of them."""
        found = {name: self.kernels[name] for name in names if name in self.kernels}
        return {name: tuple(self._table(share, members) for _, share in row) for name, row in found.items()}

    def _table(self, share: Share, members: Sequence[int]) -> tuple[int, ...]:
        order = [self.lead, *(d for d in range(len(members)) if d != self.lead)]
        if share.shared:
            common = math.lcm(*(n for n in members if n))
            weights = [share.pieces[d] * common // members[d] for d in order for _ in range(members[d])]
            return table(sum(share.pieces), weights)
        own = members[self.lead]
        return (
            (1,) if own == 1 else table(CHUNKS * own, [int(d == self.lead) for d in order for _ in range(members[d])])
        )

    def phases(self, names: Collection[str]) -> list[decision.Phase]:
        """The phases of these kernels, as a decision tells of them."""
        return [
            decision.Phase(name, n, of.way, share.pieces, share.seconds, of.alone)
            for name in names
            for n, (of, share) in enumerate(self.kernels.get(name, ()))
        ]


def way(phase: Phase, sizes: Mapping[str, int]) -> Way:
    """What is cut where the tasks of a phase are handed out: the outermost axis that has more than one point."""
    outermost = next((a for a in phase.axes if dims.evaluate(a.extent, sizes) > 1), None)
    contractions = [s for s in walk(phase.body) if isinstance(s, Contract)]
    columns = any(v is outermost for s in contractions for v, _ in s.b_index.terms)
    rows = any(v is outermost for s in contractions for v, _ in s.a_index.terms)
    return "columns" if columns and not rows else "rows"


def divisible(
    work: Work, way: Way, rates: Sequence[Rates], cores: Sequence[int], given: Sequence[float] = ()
) -> Divisible:
    """A phase for the placement. `rates` and numbers of `cores` are those of each device, `given`: of its time."""
    parts = given or [1.0] * len(cores)
    return Divisible(
        pieces=math.floor(min(work.tasks // max(work.grain, 1.0), work.tasks)),
        alone=tuple(r.slower(1 / part).seconds(work, n) for r, n, part in zip(rates, cores, parts, strict=True)),
        core=tuple(r.core(work, sum(cores)) for r in rates),
        fixed=max(r.dispatch + r.wake for r in rates),
        bytes=math.ceil(work.touched),
        way=way,
        given=tuple(parts),
    )


def _phases(lowered: Mapping[str, Lowered], name: str) -> tuple[Phase, ...]:
    return lowered[name].program.phases
