"""Watches the guest's journal on its disk from outside, while it is written: one writer only, and none of the past.

A disk that is local has an image on either host while it is copied. Both are watched: what is copied is the same there.

A record has a sequence number and the guest's clock (lab/guest/journal.c), and each number is written once. Two copies
of a guest that both run write the same numbers at different times: whichever comes second is seen to replace the first.
"""

import itertools
import struct
import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from handoff_lab.journal import RECORD_BYTES, REGION_BEGIN

SPAN_MIB: Final = 1
RATE_MIB_PER_S: Final = 0.2
"""Small records, one a write: some fifty a second. The span then lasts for five seconds, fifty looks."""
LOOK_EVERY_S: Final = 0.1
_MAGIC: Final = int.from_bytes(b"HOJRNL01", "little")
_HEAD: Final = struct.Struct("<6Q")


@dataclass(slots=True)
class Sightings:
    """What was seen so far of one epoch. Pure: `note` it record by record."""

    clocks: dict[int, int] = field(default_factory=dict)
    newest: int = 0
    contradiction: str = ""

    def note(self, seq: int, clock_ns: int) -> None:
        """One record on the disk."""
        known = self.clocks.setdefault(seq, clock_ns)
        if known != clock_ns:
            self._contradict(f"record {seq} was written twice, {abs(clock_ns - known) / 1e6:.0f} ms apart")
        self.newest = max(self.newest, seq)

    def in_order(self) -> None:
        """Checks that later records have later clocks."""
        for (seq, clock_ns), (following, later_ns) in itertools.pairwise(sorted(self.clocks.items())):
            if later_ns < clock_ns:
                self._contradict(f"record {following} is older than record {seq}")

    def _contradict(self, what: str) -> None:
        self.contradiction = self.contradiction or what


class Writers:
    """Looks at the images of a disk all the time. Use it as a context."""

    def __init__(self, images: Collection[Path]) -> None:
        """`images`: wherever it may have one, raw; they may come and go."""
        self._images = tuple(images)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="writers", daemon=True)
        self._epochs: dict[int, Sightings] = {}
        self._slots: dict[tuple[Path, int], tuple[int, int]] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join()

    def problems(self, epoch: int, acked_seq: int) -> list[str]:
        """What speaks against a single writer, whose journal has `epoch` and has been stopped at `acked_seq`."""
        self._look()
        found = [seen.contradiction for seen in self._epochs.values() if seen.contradiction]
        seen = self._epochs.get(epoch, Sightings())
        if seen.newest > acked_seq:
            found.append(f"the disk has record {seen.newest}, and the guest has written only {acked_seq}")
        return found

    def contradictions(self) -> list[str]:
        """The same, of a guest that can't be asked any more."""
        self._look()
        return [seen.contradiction for seen in self._epochs.values() if seen.contradiction]

    @property
    def records(self) -> int:
        """How many different records have been seen."""
        return sum(len(seen.clocks) for seen in self._epochs.values())

    def _watch(self) -> None:
        while not self._ending.wait(LOOK_EVERY_S):
            self._look()

    def _look(self) -> None:
        for image in self._images:
            self._look_at(image)
        for seen in self._epochs.values():
            seen.in_order()

    def _look_at(self, image: Path) -> None:
        try:
            with image.open("rb") as file:
                file.seek(REGION_BEGIN)
                region = file.read(SPAN_MIB << 20)
        except OSError:
            return
        for offset in range(0, len(region) - RECORD_BYTES + 1, RECORD_BYTES):
            magic, seq, clock_ns, _, epoch, _ = _HEAD.unpack_from(region, offset)
            if magic == _MAGIC and self._slots.get((image, offset)) != (seq, clock_ns):
                self._slots[image, offset] = (seq, clock_ns)
                self._epochs.setdefault(epoch, Sightings()).note(seq, clock_ns)
