"""Devices as a user names them: sets of this machine's cores, and what is not one.

    cpu                     all CPUs that the process may use
    cpu:0   cpu:0-3,6       these CPUs
    cpu:1@0.4               these, of which the process gets only such a share of the time (a quota, a neighbour)
    big   little   a73      a cluster by its name, or all cores of the highest or the lowest capacity
    onnxruntime             a delegate for what stitch cannot run
    null                    runs nothing: for trying out a placement

`parse` makes a `Device` of such a text, `parse(str(device), board)` the same one again. `parse_all` sees that no CPU
belongs to two devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal

from stitch.errors import EmptyDevice, OverlappingDevices, UnavailableCpus, UnknownDevice
from stitch.topology import Board, Cluster, parse_cpus, render_cpus

Kind = Literal["cpu", "onnxruntime", "null"]
OTHERS: tuple[Kind, ...] = ("onnxruntime", "null")


@dataclass(frozen=True)
class Device:
    """`clusters` are those that the device's CPUs belong to, as far as they do; none where it is not a set of cores.
    `share`: of the time of its cores, what the process gets."""

    kind: Kind
    clusters: tuple[Cluster, ...] = ()
    share: float = 1.0

    @property
    def cpus(self) -> tuple[int, ...]:
        return tuple(sorted(cpu for c in self.clusters for cpu in c.cpus))

    @property
    def cores(self) -> int:
        """Physical cores: two CPUs of one core compute little more than one. At least 1 for a device without CPUs."""
        return max(1, sum(len(c.cores) for c in self.clusters))

    def __str__(self) -> str:
        share = f"@{self.share:g}" if self.share != 1 else ""
        return f"cpu:{render_cpus(self.cpus)}{share}" if self.kind == "cpu" else self.kind


def parse(text: str, board: Board) -> Device:
    """The device that `text` names on a board. Raises UnknownDevice, EmptyDevice, UnavailableCpus."""
    if not isinstance(text, str):
        raise UnknownDevice(repr(text), available=available(board), reason="a device is named by a text")
    name, at, share = text.strip().partition("@")
    if at:
        device = parse(name, board)
        if device.kind != "cpu" or not _is_share(share):
            raise UnknownDevice(text, available=available(board), reason="a share is a number above 0, up to 1")
        return replace(device, share=float(share))
    for kind in OTHERS:
        if name == kind:
            return Device(kind)
    if name == "cpu":
        return Device("cpu", board.clusters)
    if name in board.nicknames:
        return Device("cpu", board.only(board.nicknames[name]))
    head, colon, listed = name.partition(":")
    if head != "cpu" or not colon:
        raise UnknownDevice(text, available=available(board), reason=_reason(name, board))
    try:
        cpus = parse_cpus(listed)
    except ValueError as problem:
        raise UnknownDevice(text, available=available(board), reason=str(problem)) from None
    if not cpus:
        raise EmptyDevice(text, available=render_cpus(board.cpus))
    missing = [cpu for cpu in cpus if cpu not in board.cpus]
    if missing:
        outside = [cpu for cpu in missing if cpu in board.excluded]
        raise UnavailableCpus(
            text, cpus=render_cpus(outside or missing), available=render_cpus(board.cpus), excluded=bool(outside)
        )
    return Device("cpu", board.only(cpus))


def parse_all(texts: Iterable[str], board: Board) -> tuple[Device, ...]:
    """Devices, at least one, that have no CPU in common. Raises what `parse` raises, and OverlappingDevices.

    A text alone is a device, not a list of letters."""
    texts = listed(texts)
    found = tuple(parse(text, board) for text in texts)
    if not found:
        raise EmptyDevice("", available=render_cpus(board.cpus))
    _distinct(texts, found, board)
    return found


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False


def listed(texts: Iterable[str]) -> list[str]:
    """What may be one device, or several."""
    return [texts] if isinstance(texts, str | bytes) or not isinstance(texts, Iterable) else list(texts)


def _distinct(texts: Sequence[str], found: Sequence[Device], board: Board) -> None:
    for k, device in enumerate(found):
        for other in range(k):
            shared = set(device.cpus) & set(found[other].cpus)
            if shared:
                raise OverlappingDevices(
                    texts[other], texts[k], cpus=render_cpus(shared), available=render_cpus(board.cpus)
                )


def available(board: Board) -> list[str]:
    """What may be written for a device of a board."""
    return list(dict.fromkeys(["cpu", f"cpu:{render_cpus(board.cpus)}", *board.nicknames, *OTHERS]))


def _reason(name: str, board: Board) -> str:
    if name in ("big", "little"):
        return "all cores of this machine have the same capacity"
    close = get_close_matches(name, available(board), n=1)
    return f"did you mean {close[0]!r}?" if close else ""
