"""Proves a guest's disks: nothing lost, torn or repeated of what it writes, and not a byte changed of what it doesn't.

One disk gets the guest's journal, written all the time; every other byte of all disks must be what it was when they
were made (pattern.py). A check suspends the guest for a moment, wherever it is by then, and reads the images that its
live definition names there, with their backing files; so its QEMU has written everything out. No block job may be
running: check after the migration is done.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lxml import etree

from handoff_lab.errors import LabError
from handoff_lab.guest import Guests, virsh
from handoff_lab.host import Host
from handoff_lab.journal import REGION_BEGIN, ImageCheck, check_journal
from handoff_lab.pattern import MIB, PATTERN_BEGIN, Content, Pattern
from handoff_lab.probe import GuestControl, JournalCheck, JournalStatus
from handoff_lab.reader import DiskReader

DEFAULT_RATE_MIB_PER_S = 1.0
DEFAULT_SPAN_MIB = 8
WRONG_SHOWN = 5
# Of records, as the guest's program writes them at once.
LARGEST_BATCH = 64


@dataclass(frozen=True, slots=True)
class DiskFound:
    """A disk as it is now. `allocated_bytes`: of its top image; `layers`: that one and its backing files."""

    target: str
    host: str
    path: str
    format: str
    size_bytes: int
    allocated_bytes: int
    layers: int


@dataclass(frozen=True, slots=True)
class DiskCheck:
    """One disk: the first MiB (as offsets) that are not what was made, and what its image says of the journal."""

    disk: DiskFound
    wrong_at: tuple[int, ...]
    compared_bytes: int
    journal: ImageCheck | None = None

    @property
    def intact(self) -> bool:
        """Whether every byte of it is right."""
        return not self.wrong_at and (self.journal is None or self.journal.intact)


@dataclass(frozen=True, slots=True)
class Verdict:
    """All disks from outside, and the journal as the guest itself reads it. A test asserts `intact`."""

    disks: tuple[DiskCheck, ...]
    inside: JournalCheck
    faults: tuple[str, ...] = field(default=())

    @property
    def intact(self) -> bool:
        """Whether nothing is wrong anywhere."""
        return not self.faults

    def disk(self, target: str) -> DiskFound:
        """One disk as it was found. Raises LabError when there is no such."""
        for check in self.disks:
            if check.disk.target == target:
                return check.disk
        raise LabError(f"the guest has no disk {target}")


class DiskProof:
    """The proof for one guest. `begin` it before the move; `check` it after each."""

    def __init__(self, guests: Guests, name: str, inside: GuestControl, target: str = "vda") -> None:
        """`target`: the disk that gets the journal."""
        self._guests = guests
        self._record = guests.lab.guest(name)
        self._inside = inside
        self._target = target

    async def begin(
        self, rate_mib_per_s: float = DEFAULT_RATE_MIB_PER_S, span_mib: int = DEFAULT_SPAN_MIB
    ) -> "DiskProof":
        """Starts the journal; while it runs, sets its rate. Raises LabError when it would reach into the pattern."""
        if REGION_BEGIN + span_mib * MIB > PATTERN_BEGIN:
            raise LabError(f"a journal of {span_mib} MiB reaches beyond the {PATTERN_BEGIN // MIB} MiB that it has")
        await self._inside.journal_start(rate_mib_per_s, span_mib, f"/dev/{self._target}")
        return self

    async def check(self) -> Verdict:
        """Compares everything; the journal goes on afterwards. Raises LabError, OSError, TimeoutError."""
        inside = await self._inside.journal_verify()
        seen = await asyncio.to_thread(_read_images, self._guests, self._record.name, self._target)
        after = (await self._inside.status()).journal
        checks = tuple(self._judge(disk, inside, after) for disk in seen)
        return Verdict(checks, inside, tuple(_faults(checks, inside, after)))

    def _judge(self, seen: "_DiskRead", before: JournalCheck, after: JournalStatus) -> DiskCheck:
        journal = None
        if seen.journal:

            def read(offset: int, length: int) -> bytes:
                return seen.journal[offset - REGION_BEGIN :][:length]

            # What was written between the two answers is right as well, and so is what is being written now.
            newest = after.acked_seq + LARGEST_BATCH
            journal = check_journal(read, before.epoch, after.slots, before.acked_seq, newest)
        return DiskCheck(seen.disk, seen.wrong_at, seen.compared_bytes, journal)


@dataclass(frozen=True, slots=True)
class _DiskRead:
    """What was read while the guest was suspended. `journal`: the journal's part of the disk that has it."""

    disk: DiskFound
    wrong_at: tuple[int, ...]
    compared_bytes: int
    journal: bytes


def inspect(guests: Guests, name: str) -> tuple[DiskCheck, ...]:
    """Compares every disk of a guest that writes nothing with what was made. Raises LabError, OSError."""
    seen = _read_images(guests, name, "")
    return tuple(DiskCheck(one.disk, one.wrong_at, one.compared_bytes) for one in seen)


def _read_images(guests: Guests, name: str, journal_target: str) -> list[_DiskRead]:
    host = guests.running_on(name)
    made = {disk.target: disk.pattern for disk in guests.lab.guest(name).disks}
    found = []
    with _suspended(host, guests, name) as slot:
        root = etree.fromstring(virsh(host, slot, "dumpxml", name).encode())
        for disk in root.iterfind("devices/disk"):
            target = _get(disk, "target", "dev")
            if target in made:
                found.append(_read(guests, host, disk, made[target], has_journal=target == journal_target))
    return found


def _read(guests: Guests, host: Host, disk: etree._Element, pattern: Pattern, *, has_journal: bool) -> _DiskRead:
    node, path, image_format = host.node, _get(disk, "source", "file"), _get(disk, "driver", "type")
    if disk.get("type") == "network":
        storage = guests.fleet.storage
        node, path = storage.node, str(storage.volumes / f"{_get(disk, 'source', 'name')}.raw")
    reader = DiskReader(node, path, image_format)
    found = DiskFound(
        target=_get(disk, "target", "dev"),
        host=node.name,
        path=path,
        format=image_format,
        size_bytes=reader.size_bytes,
        allocated_bytes=reader.allocated_bytes,
        layers=reader.layers,
    )
    wrong, compared = compare(reader, pattern, skip_journal=has_journal)
    if reader.size_bytes != pattern.size_mib * MIB:
        wrong = (reader.size_bytes, *wrong)
    journal = reader.read(REGION_BEGIN, min(PATTERN_BEGIN, reader.size_bytes) - REGION_BEGIN) if has_journal else b""
    return _DiskRead(found, wrong[:WRONG_SHOWN], compared, journal)


def compare(reader: DiskReader, pattern: Pattern, *, skip_journal: bool) -> tuple[tuple[int, ...], int]:
    """The offsets of the MiB that differ from what was made, and how many bytes were compared."""
    wrong: list[int] = []
    compared = 0
    for offset, expected in _expected(pattern, skip_journal=skip_journal):
        compared += MIB
        if expected is None:
            if not reader.is_hole(offset, MIB) and any(reader.read(offset, MIB)):
                wrong.append(offset)
        elif reader.read(offset, MIB) != expected:
            wrong.append(offset)
    return tuple(wrong), compared


def _expected(pattern: Pattern, *, skip_journal: bool) -> Iterator[tuple[int, bytearray | None]]:
    """Every MiB of the disk, by its offset; None for zeros."""
    blocks = pattern.data()
    yield 0, None
    if not skip_journal:
        for offset in range(REGION_BEGIN, min(PATTERN_BEGIN, pattern.size_mib * MIB), MIB):
            yield offset, None
    for extent in pattern.extents():
        for offset in range(extent.start, extent.end, MIB):
            yield offset, blocks.at(offset) if extent.content is Content.DATA else None


@contextmanager
def _suspended(host: Host, guests: Guests, name: str) -> Iterator[str]:
    """Stops the guest for a moment, unless it is paused; QEMU then writes out all that it has. Gives its slot."""
    seen = next(one for one in guests.find(name) if one.host == host.name and one.state != "shut off")
    runs = seen.state == "running"
    if runs:
        virsh(host, seen.slot, "suspend", name)
    try:
        yield seen.slot
    finally:
        if runs:
            virsh(host, seen.slot, "resume", name)


def _faults(checks: tuple[DiskCheck, ...], inside: JournalCheck, after: JournalStatus) -> Iterator[str]:
    if not inside.intact:
        yield f"the guest reads a broken journal: {inside}"
    if after.write_errors:
        yield f"{after.write_errors} writes of the guest failed"
    for check in checks:
        where = f"{check.disk.target} ({check.disk.path} on {check.disk.host})"
        if check.journal is not None and not check.journal.intact:
            yield f"{where} holds a broken journal: {check.journal}"
        if check.wrong_at:
            yield f"{where} is not what it was at {', '.join(map(str, check.wrong_at))}"


def _get(disk: etree._Element, tag: str, attribute: str) -> str:
    child = disk.find(tag)
    return "" if child is None else child.get(attribute, "")
