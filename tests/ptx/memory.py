"""Memory that a kernel may touch: accesses are checked for bounds, alignment and races."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

Lanes = Any
_TYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_NOBODY = 0
_POISON = 0xFF
_UNSET = 0xA5
_OFFSETS = np.arange(16)


class Fault(Exception):
    """A kernel did what it must not; the message says what, a note where."""


@dataclass(frozen=True)
class Who:
    """Whose an access is, a number a lane.

    Attributes:
        warp: numbered from 1 over all blocks of a launch.
        block: of the launch.
        slot: the block's place among those that run together.
        epoch: barriers that they have passed.
        warps: of a block.
    """

    warp: Lanes
    block: Lanes
    slot: Lanes
    epoch: int
    warps: int


class Region:
    """Bytes from ``start`` on, who wrote each of them in this launch, and when.

    Barriers order accesses of the warps of a block, nothing those of blocks. What is read of a byte that another warp
    wrote with no barrier between is poison: a GPU may give the new number or the old one, so nothing may depend on it.
    """

    def __init__(self, start: int, data: Any) -> None:
        self.start, self.data = start, data
        self.writer, self.written = (np.zeros(len(data), np.int32) for _ in range(2))  # costs nothing where untouched


class Memory:
    """Regions of one address space, none beside another.

    Args:
        regions: in order of their addresses.
        what: its name, for people.
        stride: bytes of a block, if each block has its own from address 0 on.
    """

    def __init__(self, regions: list[Region], what: str, stride: int = 0) -> None:
        self.regions, self.what, self.stride = regions, what, stride

    def load(self, addresses: Lanes, width: int, many: int, active: Lanes, who: Who) -> Lanes:
        """Numbers of ``width`` bytes, ``[lane, many]``, from ``addresses [lane]`` on; zero where not ``active``."""
        is_whole = bool(active.all())
        if not is_whole and not active.any():
            return np.zeros((len(addresses), many), _TYPES[width])
        region, touched = self._find(addresses if is_whole else addresses[active], width * many, who)
        found, racing = region.data[touched], self._racing(region, touched, who)
        if racing is not None:
            found[racing] = _POISON
        found = found.view(_TYPES[width])
        if is_whole:
            return found
        whole = np.zeros((len(addresses), many), _TYPES[width])
        whole[active] = found
        return whole

    def store(self, addresses: Lanes, numbers: Lanes, active: Lanes, who: Who) -> None:
        """Write ``numbers [lane, many]`` from ``addresses [lane]`` on where ``active``."""
        if not active.any():
            return
        new = np.ascontiguousarray(numbers[active]).view(np.uint8)
        region, touched = self._find(addresses[active], new.shape[1], who)
        racing = self._racing(region, touched, who)
        if racing is not None and (racing & (region.data[touched] != new)).any():  # several may write the same
            raise Fault(f"{self.what} write of what another warp wrote otherwise, with nothing that orders them")
        region.data[touched] = new
        region.writer[touched], region.written[touched] = who.warp[:, None], who.epoch

    def _find(self, addresses: Lanes, size: int, who: Who) -> tuple[Region, Lanes]:
        """The region of accesses of ``size`` bytes, and the places in it of all their bytes."""
        if (addresses & np.uint64(size - 1)).any():
            raise Fault(f"{self.what} access of {size} bytes at an address that is no multiple of them")
        low, high = int(addresses.min()), int(addresses.max()) + size
        if self.stride:
            if high > self.stride:
                raise Fault(f"{self.what} access at {high - size:#x} .. {high:#x} of {self.stride} bytes")
            return self.regions[0], (addresses + who.slot * np.uint64(self.stride)).astype(np.int64)[:, None] + (
                _OFFSETS[:size]
            )
        for region in self.regions:
            if region.start <= low and high <= region.start + len(region.data):
                return region, (addresses - np.uint64(region.start)).astype(np.int64)[:, None] + _OFFSETS[:size]
        inside = [f"{region.start:#x} .. {region.start + len(region.data):#x}" for region in self.regions]
        raise Fault(f"{self.what} access at {low:#x} .. {high:#x}, outside of {', '.join(inside)}")

    def _racing(self, region: Region, touched: Lanes, who: Who) -> Lanes | None:
        """Which bytes another warp wrote that nothing made wait; None if there are none."""
        writer = region.writer[touched]
        other = (writer != _NOBODY) & (writer != who.warp[:, None])
        if not other.any():
            return None
        is_same = (writer - 1) // who.warps == who.block[:, None]
        return other & (~is_same | (region.written[touched] == who.epoch))


def shared_memory(size: int, stride: int) -> Memory:
    """The shared memory of blocks that run together, which holds nothing that anybody may rely on."""
    return Memory([Region(0, np.full(size, _UNSET, np.uint8))], "shared", stride)


def global_memory(tensors: list[tuple[int, int]]) -> Memory:
    """Memory of this process: addresses, and how many bytes from each on may be touched."""
    regions = []
    for start, size in sorted(set(tensors)):
        if size:
            regions.append(Region(start, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))))
    return Memory(regions, "global")
