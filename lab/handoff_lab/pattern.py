"""What a made disk holds, byte for byte: which parts are data, which are written zeros, and which are holes. Pure.

The first 64 MiB belong to the guest's journal (lab/guest/journal.c). Behind them data, zeros and holes alternate in
up to eight stripes, all of whole MiB. The data is random and different in each 4 KiB, and follows from the disk's seed:
the layout and the seed are the manifest by which every byte that the guest has not written is checked.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from handoff_lab.errors import LabError

MIB = 1 << 20
PATTERN_BEGIN = 64 * MIB
STRIPES = 8
_BLOCK = 4096
_STAMP_BYTES = 16
_SIZE = re.compile(r"(\d+)([MGT])")
_MIB_IN = {"M": 1, "G": 1 << 10, "T": 1 << 20}


def parse_mib(text: str) -> int:
    """Reads "500M", "4G", "1T" or "0". Raises LabError for anything else."""
    if text == "0":
        return 0
    match = _SIZE.fullmatch(text)
    if match is None:
        raise LabError(f"{text}: a size is a number with M, G or T behind, such as 1G")
    return int(match[1]) * _MIB_IN[match[2]]


class Content(Enum):
    """What an extent was written with."""

    DATA = "data"
    ZEROS = "zeros"
    """Written, and so allocated, but nothing else than zeros."""
    HOLE = "hole"


@dataclass(frozen=True, slots=True)
class Extent:
    """A part of a disk, in bytes; whole MiB."""

    start: int
    length: int
    content: Content

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Pattern:
    """The layout of one disk. All sizes are MiB."""

    size_mib: int
    data_mib: int
    zeros_mib: int
    seed: int

    @property
    def fits(self) -> bool:
        """Whether data and zeros fit behind the journal; a disk without both always fits."""
        wanted = self.data_mib + self.zeros_mib
        return wanted == 0 or PATTERN_BEGIN // MIB + wanted <= self.size_mib

    def extents(self) -> Iterator[Extent]:
        """Every part behind the journal's, in order."""
        room_mib = max(0, self.size_mib - PATTERN_BEGIN // MIB)
        parts = (
            (Content.DATA, self.data_mib),
            (Content.ZEROS, self.zeros_mib),
            (Content.HOLE, room_mib - self.data_mib - self.zeros_mib),
        )
        at = PATTERN_BEGIN
        for stripe in range(STRIPES):
            for content, total_mib in parts:
                length = (total_mib * (stripe + 1) // STRIPES - total_mib * stripe // STRIPES) * MIB
                if length:
                    yield Extent(at, length, content)
                    at += length

    def data(self) -> "DataBlocks":
        """What the extents of data hold."""
        return DataBlocks(self.seed)


class DataBlocks:
    """Random bytes, a MiB at a time: one random MiB, whose every 4 KiB begin with the seed and their place."""

    def __init__(self, seed: int) -> None:
        self._seed = seed.to_bytes(8, "little")
        # Not for secrets: the same seed must give the same bytes.
        self._base = random.Random(seed).randbytes(MIB)  # noqa: S311

    def at(self, offset: int) -> bytearray:
        """The MiB that begins at `offset` of the disk."""
        block = bytearray(self._base)
        for start in range(0, MIB, _BLOCK):
            block[start : start + _STAMP_BYTES] = self._seed + (offset + start).to_bytes(8, "little")
        return block
