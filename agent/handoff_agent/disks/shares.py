"""How connections share one rate. Pure: what each has sent of late in, what each may send from now on out.

A mirror that goes through zeros sends nothing, and the others should have its share meanwhile. The shares are never
more than the rate together, so that it holds over any time, however short, whatever the disks contain.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# One that sends that part of its share would send more.
BUSY: Final = 0.7
# What one that sends nothing keeps of an even share: enough to be seen busy when data comes.
IDLE: Final = 0.125


@dataclass(frozen=True, slots=True)
class Use:
    """What one connection did since the last time."""

    share_bytes_per_s: int
    sent_bytes_per_s: float

    @property
    def busy(self) -> bool:
        """It had more to send, or may have had."""
        return self.sent_bytes_per_s >= BUSY * self.share_bytes_per_s


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
