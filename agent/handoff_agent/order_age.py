"""Refuses to run a guest on an order that was on its way for too long, as in the buffers of a link that was cut.

A leader tells with its order what this host's clock said when it last heard from the agent. No other clock is needed.
"""

import time
from typing import Final

from handoff_common.errors import PreconditionError

# Longer than any call of a leader lasts. Who takes a silent host's guest away waits for longer than this.
ORDER_LIFE_MS: Final = 10_000


def clock_ms() -> int:
    """Milliseconds since this host was started."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def check_age(heard_ms: int, now_ms: int) -> None:
    """Raises PreconditionError for an order by a leader that heard from this agent too long ago, or before a boot."""
    age_ms = now_ms - heard_ms
    if age_ms > ORDER_LIFE_MS or age_ms < 0:
        raise PreconditionError(
            f"the order to run the guest is by a leader that heard from this agent {age_ms / 1000:.1f} s before: it may"
            " be out of date; ask for the handoff again first"
        )
