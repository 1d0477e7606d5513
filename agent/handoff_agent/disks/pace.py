"""When must the guest's writes wait for the destination? Pure: readings of a mirror in, a decision with its reason out.

A mirror sends what the disk holds, then again what the guest wrote meanwhile, and so on. It never ends for a guest that
writes faster than the link. Then each write has to wait until the destination has it too (copy-mode write-blocking):
the guest is slowed to the link's pace, and what is left only shrinks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# Shorter, and a burst of writes would be taken for a habit.
CATCHING_UP_S: Final = 2.0
# The estimate of the rest is from the last of these seconds.
WINDOW_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading of one disk's mirror."""

    elapsed_s: float
    """Since the mirror began."""
    done_bytes: int
    total_bytes: int
    """Grows with what the guest writes."""
    ready: bool = False

    @property
    def left_bytes(self) -> int:
        """Still to send, as it is now."""
        return max(0, self.total_bytes - self.done_bytes)


@dataclass(frozen=True, slots=True)
class Pace:
    """Whether the guest's writes should wait, and why."""

    write_blocking: bool
    reason: str


def rate_bytes_per_s(samples: Sequence[Sample]) -> float:
    """Rate over the last WINDOW_S; 0 without two samples."""
    recent = [sample for sample in samples if sample.elapsed_s >= samples[-1].elapsed_s - WINDOW_S]
    if len(recent) < 2 or recent[-1].elapsed_s <= recent[0].elapsed_s:
        return 0.0
    return max(0.0, (recent[-1].done_bytes - recent[0].done_bytes) / (recent[-1].elapsed_s - recent[0].elapsed_s))


def decide(samples: Sequence[Sample]) -> Pace:
    """Judges by the samples, oldest first; there is at least one."""
    last = samples[-1]
    left = f"{last.left_bytes >> 20} MiB left"
    if last.ready:
        return Pace(write_blocking=False, reason="in step with the guest")
    # While QEMU still looks for what is allocated there is no total.
    first_pass_bytes = next((sample.total_bytes for sample in samples if sample.total_bytes), 1)
    if last.done_bytes < first_pass_bytes:
        return Pace(write_blocking=False, reason=f"first pass, {left}")
    since = next(sample for sample in samples if sample.done_bytes >= first_pass_bytes)
    behind_s = last.elapsed_s - since.elapsed_s
    if behind_s < CATCHING_UP_S:
        return Pace(write_blocking=False, reason=f"catching up with the guest, {left}")
    if last.left_bytes < since.left_bytes / 2:
        return Pace(write_blocking=False, reason=f"catching up with the guest, {left}")
    why = f"the guest writes as fast as is sent, {left} for {behind_s:.0f} s: its writes wait for the destination"
    return Pace(write_blocking=True, reason=why)
