"""The space that images of guests that come need here. Pure.

What is free now is not all free: images that are on their way still grow by what they have been promised.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from handoff.agent.v1 import disk_pb2 as pb

# qcow2's tables, and what the guest writes while the plan is carried out.
SPACE_FACTOR: Final = 1.02
SPACE_RESERVE_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class PathFacts:
    """What is at a path of this host where a disk is to be."""

    exists: bool = False
    folder_exists: bool = True
    file_system: int = 0
    """Tells paths apart that share their free space."""
    free_bytes: int = 0
    allocated_bytes: int = 0
    """Of what is there."""


@dataclass(frozen=True, slots=True)
class Promise:
    """The space of one disk that is on its way here."""

    guest: str
    path: str
    size_bytes: int
    """All that it may take, what it has by now too."""


def space_needed_bytes(move: pb.DiskMove) -> int:
    """Free space that a disk needs here before it is begun: what it holds now, never what it may hold one day."""
    return min(int(move.bytes_to_send * SPACE_FACTOR), move.virtual_size_bytes) + SPACE_RESERVE_BYTES


def promised_bytes(promises: Sequence[Promise], paths: Mapping[str, PathFacts], file_system: int) -> dict[str, int]:
    """What disks on their way to a file system still lack, by guest; without those that lack nothing."""
    lacking: dict[str, int] = defaultdict(int)
    for promise in promises:
        facts = paths[promise.path]
        if facts.folder_exists and facts.file_system == file_system and promise.size_bytes > facts.allocated_bytes:
            lacking[promise.guest] += promise.size_bytes - facts.allocated_bytes
    return dict(lacking)
