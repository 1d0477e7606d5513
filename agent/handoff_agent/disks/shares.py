"""How connections share one rate. Pure: what each has sent of late in, what each may send from now on out.

A mirror that goes through zeros sends nothing, and the others should have its share meanwhile. What all of them leave
unused for a moment is made good, but slowly: the shares are never more than the rate and CATCH_UP of it together, which
holds over any time, however short, whatever the disks contain, and also when nobody looks any more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# One that sends that part of its share would send more.
BUSY: Final = 0.7
# What one that sends nothing keeps of an even share: enough to be seen busy when data comes.
IDLE: Final = 0.125
# Faster than the rate, to make good what was left unused; at most that of the last moment.
CATCH_UP: Final = 0.05
MOMENT_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class Use:
    """What one connection did since the last time."""

    share_bytes_per_s: int
    sent_bytes_per_s: float

    @property
    def busy(self) -> bool:
        """It had more to send, or may have had."""
        return self.sent_bytes_per_s >= BUSY * self.share_bytes_per_s


def credit_bytes(rate_bytes_per_s: int, before: float, sent: int, elapsed_s: float) -> float:
    """What may be sent above the rate after `sent` bytes in a time; below 0: what was sent too much."""
    return min(MOMENT_S * rate_bytes_per_s, before + elapsed_s * rate_bytes_per_s - sent)


def catching_up(rate_bytes_per_s: int, credit: float, time_s: float) -> int:
    """The rate that uses the credit up in a time, as far as it may."""
    most = CATCH_UP * rate_bytes_per_s
    return int(rate_bytes_per_s + max(-most, min(most, credit / time_s)))


def even_shares(rate_bytes_per_s: int, connections: int) -> list[int]:
    """For connections of which nothing is known yet."""
    return [rate_bytes_per_s // connections] * connections


def shares(rate_bytes_per_s: int, uses: Sequence[Use]) -> list[int]:
    """One share for each use, in bytes a second. Those that are busy have equal ones."""
    even = rate_bytes_per_s // len(uses)
    needs = [even if use.busy else min(even, max(int(IDLE * even), int(2 * use.sent_bytes_per_s))) for use in uses]
    busy = sum(use.busy for use in uses)
    left = rate_bytes_per_s - sum(needs)
    # With nobody busy the rest goes to all, and whoever gets data first need not wait for it.
    return [
        need + (left // busy if use.busy else 0 if busy else left // len(uses))
        for need, use in zip(needs, uses, strict=True)
    ]
