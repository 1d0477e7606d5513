"""When may the guest be switched over? Pure: readings of QEMU's statistics in, a decision with its reason out.

QEMU sends the memory in passes; each begins with the pages that the guest dirtied during the one before. On a fast
link the last passes take less than a millisecond, and when one finds nothing dirty QEMU pauses the guest by itself,
asked or not (measured on 10.0: 2 to 70 ms after the first pass). So the copy must be slowed before a pass ends that
could be the last: READY is decided near the end of a pass, by what the next one is expected to find.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

# A reading and the order to slow down take some 4 ms together; in that time QEMU skips 16 MiB of zero pages.
LARGEST_RESERVE_BYTES: Final = 16 << 20
SMALLEST_RESERVE_BYTES: Final = 1 << 20
RESERVE_SHARE_OF_DOWNTIME: Final = 1 / 3
# How fast what is left can shrink at the most, when all that is left is zero pages.
ZERO_PAGES_BYTES_PER_S: Final = 4e9
SHORTEST_POLL_S: Final = 0.002
LONGEST_POLL_S: Final = 0.1


class Action(Enum):
    """What to do with the copy."""

    CONTINUE = "continue"
    READY = "ready"


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading of query-migrate. Times are seconds."""

    elapsed_s: float
    pass_elapsed_s: float
    """Since the present pass began."""
    ram_total_bytes: int
    ram_transferred_bytes: int
    ram_remaining_bytes: int
    throughput_bytes_per_s: int
    """QEMU's own figure; 0 until it has one."""
    dirty_bytes_per_s: int
    """0 until measured."""
    iterations: int
    """Passes begun; 1 is the first, over all memory."""
    cpu_throttle_percent: int = 0

    @property
    def rate_bytes_per_s(self) -> float:
        """Rate of the copy; 0 when nothing was sent yet."""
        if self.throughput_bytes_per_s:
            return float(self.throughput_bytes_per_s)
        return self.ram_transferred_bytes / self.elapsed_s if self.elapsed_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class ConvergenceSettings:
    """What the policy may plan for."""

    downtime_limit_ms: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and why in a sentence."""

    action: Action
    reason: str


def expected_downtime_ms(sample: Sample) -> float | None:
    """Time to send what is left and what the next pass should find; None while no rate is known."""
    rate = sample.rate_bytes_per_s
    if rate <= 0:
        return None
    pass_s = sample.pass_elapsed_s + sample.ram_remaining_bytes / rate
    left_bytes = sample.ram_remaining_bytes + min(sample.dirty_bytes_per_s * pass_s, sample.ram_total_bytes)
    return 1000 * left_bytes / rate


def reserve_bytes(sample: Sample, settings: ConvergenceSettings) -> float:
    """What must be left of a pass when the copy is slowed, so that it can be held there."""
    share = sample.rate_bytes_per_s * settings.downtime_limit_ms / 1000 * RESERVE_SHARE_OF_DOWNTIME
    return min(max(share, SMALLEST_RESERVE_BYTES), LARGEST_RESERVE_BYTES)


def next_look_s(sample: Sample, settings: ConvergenceSettings) -> float:
    """When to read again, so that the end of a pass is not missed even if only zero pages are left."""
    above_reserve = sample.ram_remaining_bytes - reserve_bytes(sample, settings)
    return min(max(above_reserve / ZERO_PAGES_BYTES_PER_S, SHORTEST_POLL_S), LONGEST_POLL_S)


def decide(samples: Sequence[Sample], settings: ConvergenceSettings) -> Decision:
    """Judges by the samples, oldest first; there is at least one."""
    last = samples[-1]
    place = f"pass {last.iterations}, {last.ram_remaining_bytes >> 20} MiB left of it"
    downtime_ms = expected_downtime_ms(last)
    if downtime_ms is None:
        return Decision(Action.CONTINUE, f"{place}; no throughput yet")
    if last.ram_remaining_bytes > reserve_bytes(last, settings):
        return Decision(Action.CONTINUE, place)
    expected = f"pause of {downtime_ms:.0f} ms expected, {settings.downtime_limit_ms} ms allowed"
    if downtime_ms <= settings.downtime_limit_ms:
        return Decision(Action.READY, f"{place}; {expected}")
    throttled = f"; CPUs slowed by {last.cpu_throttle_percent} %" if last.cpu_throttle_percent else ""
    return Decision(Action.CONTINUE, f"{place}; {expected}{throttled}")
