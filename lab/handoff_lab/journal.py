"""Checks a guest's journal in its disk image, from outside: the format is described in lab/guest/journal.c.

Only for an image that no guest writes to: stop the journal (its status names the last acknowledged record), or
the guest.
"""

import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from handoff_lab.errors import LabError

REGION_BEGIN = 1 << 20
RECORD_BYTES = 4096
CONVERT_DEADLINE_S = 600
_MAGIC = int.from_bytes(b"HOJRNL01", "little")
_HEAD = struct.Struct("<6Q")


@dataclass(frozen=True, slots=True)
class ImageCheck:
    """Of the records that must be in the image: torn have a wrong checksum, lost are older or missing, misplaced belong
    elsewhere. `first_bad_seq` is 0 when all is well."""

    checked: int
    lost: int
    torn: int
    misplaced: int
    first_bad_seq: int

    @property
    def intact(self) -> bool:
        """Whether every acknowledged record is there."""
        return not (self.lost or self.torn or self.misplaced)


def check_image(path: Path, image_format: str, epoch: int, slots: int, acked_seq: int) -> ImageCheck:
    """Checks an image; `epoch`, `slots` and `acked_seq` as the guest's JournalStatus had them. Raises LabError."""
    if image_format == "raw":
        return _check_raw(path, epoch, slots, acked_seq)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        raw = Path(scratch) / "raw"
        command = ["qemu-img", "convert", "-f", image_format, "-O", "raw", str(path), str(raw)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=CONVERT_DEADLINE_S, check=False)
        if done.returncode != 0:
            raise LabError(f"{path} can't be read: {done.stderr.strip()}")
        return _check_raw(raw, epoch, slots, acked_seq)


def _check_raw(path: Path, epoch: int, slots: int, acked_seq: int) -> ImageCheck:
    with path.open("rb") as image:

        def read(offset: int, length: int) -> bytes:
            image.seek(offset)
            return image.read(length)

        return check_journal(read, epoch, slots, acked_seq)


def check_journal(
    read: Callable[[int, int], bytes], epoch: int, slots: int, acked_seq: int, newest_seq: int = 0
) -> ImageCheck:
    """As check_image, for a disk that `read` reads: from an offset, so many bytes.

    `newest_seq`: of a journal that went on meanwhile, the last record that can have been written. By default that is
    one round after the last acknowledged one, which may have been on its way.
    """
    newest_seq = newest_seq or acked_seq + slots
    counts = {"lost": 0, "torn": 0, "misplaced": 0}
    first_bad = 0
    used = min(acked_seq, slots)
    region = memoryview(read(REGION_BEGIN, used * RECORD_BYTES))
    for slot in range(used):
        expected = slot + 1 + (acked_seq - (slot + 1)) // slots * slots
        record = bytes(region[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES])
        fault = _fault(record, slot, expected, newest_seq, epoch, slots)
        if fault is not None:
            counts[fault] += 1
            first_bad = first_bad or expected
    return ImageCheck(checked=used, first_bad_seq=first_bad, **counts)


def _fault(record: bytes, slot: int, expected: int, newest: int, epoch: int, slots: int) -> str | None:
    """What is wrong with the record in a slot, None when it is the expected one, or a newer one up to `newest`."""
    if len(record) < RECORD_BYTES:
        return "lost"
    magic, seq, _, offset, record_epoch, _ = _HEAD.unpack_from(record)
    if magic != _MAGIC or record_epoch != epoch:
        return "lost"
    if int.from_bytes(record[-4:], "little") != zlib.crc32(record[:-4]):
        return "torn"
    if offset != REGION_BEGIN + slot * RECORD_BYTES or (seq - 1) % slots != slot or seq > newest:
        return "misplaced"
    return "lost" if seq < expected else None
