"""Reads what a guest's disk holds from its image, whatever the format and with its backing files, by qemu-img's map.

QEMU may have the image open, but must not be changing it: no guest that runs, no block job.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from handoff_lab.errors import LabError
from handoff_lab.node import Node

DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the virtual disk, in bytes: zeros when `file` is None, else what is in that file at `offset`."""

    start: int
    length: int
    file: Path | None
    offset: int


class DiskReader:
    """The virtual disk in one image. `path` is as the node sees it. Raises LabError for what it can't read."""

    def __init__(self, node: Node, path: str, image_format: str) -> None:
        options = ["-U", "--output=json", "-f", image_format, path]
        chain = json.loads(node.run(["qemu-img", "info", "--backing-chain", *options], deadline_s=DEADLINE_S).stdout)
        mapped = json.loads(node.run(["qemu-img", "map", *options], deadline_s=DEADLINE_S).stdout)
        root = Path(f"/proc/{node.require_pid()}/root")
        files = [root / layer["filename"].lstrip("/") for layer in chain]
        self.size_bytes: int = chain[0]["virtual-size"]
        self.layers = len(files)
        self.allocated_bytes = 512 * files[0].stat().st_blocks
        self._pieces: list[Piece] = []
        for entry in mapped:
            if entry["data"] and "offset" not in entry:
                raise LabError(f"{path} has compressed or encrypted clusters at {entry['start']}")
            source = files[entry["depth"]] if entry["data"] else None
            self._pieces.append(Piece(entry["start"], entry["length"], source, entry.get("offset", 0)))
        self._starts = [piece.start for piece in self._pieces]

    def is_hole(self, start: int, length: int) -> bool:
        """Whether the map alone says that all of it is zeros."""
        return all(piece.file is None for piece in self._within(start, length))

    def read(self, start: int, length: int) -> bytes:
        """What the guest would read. Raises LabError beyond the end of the disk, OSError."""
        parts = []
        for piece in self._within(start, length):
            begin, end = max(start, piece.start), min(start + length, piece.start + piece.length)
            if piece.file is None:
                parts.append(bytes(end - begin))
                continue
            with piece.file.open("rb") as file:
                file.seek(piece.offset + begin - piece.start)
                found = file.read(end - begin)
            # The file may end within the last cluster.
            parts.append(found + bytes(end - begin - len(found)))
        data = b"".join(parts)
        if len(data) != length:
            raise LabError(f"the disk has no {length} bytes at {start}")
        return data

    def _within(self, start: int, length: int) -> Iterator[Piece]:
        for piece in self._pieces[max(0, bisect_right(self._starts, start) - 1) :]:
            if piece.start >= start + length:
                return
            yield piece
