"""Leadership without an election."""

import asyncio
from collections.abc import Awaitable, Callable

from handoff_controller.etcd.election import Leadership


class LastingLease:
    """For a leader who is replaced only when the test says so, and who does not notice by a clock."""

    id = 0

    def __init__(self) -> None:
        self.lost = asyncio.Event()

    def valid(self) -> bool:
        return not self.lost.is_set()


Lead = Callable[[], Awaitable[Leadership]]
"""Makes a new leader; the one before has been replaced and does not know."""
