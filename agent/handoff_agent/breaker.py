"""Ends a transfer by force, so that the guest does not stay paused for one that hangs."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Final

import structlog

from handoff_agent.outgoing import OutgoingMigration
from handoff_agent.stream import Stream
from handoff_common.errors import HandoffError

CANCEL_TIMEOUT_S: Final = 5.0
RETRY_S: Final = 0.2


class Breaker:
    """The deadline of a pause. When it has passed the stream is cut and QEMU is told to give the migration up."""

    def __init__(
        self,
        migration: OutgoingMigration,
        log: structlog.typing.FilteringBoundLogger,
        on_break: Callable[[], None],
    ) -> None:
        """`on_break` is called when the transfer is broken, before QEMU is told."""
        self.stream: Stream | None = None
        """Ours while we have it: an agent that was restarted does not."""
        self.reason = ""
        """Why it was broken; empty while it was not."""
        self._migration = migration
        self._log = log
        self._on_break = on_break
        self._timer: asyncio.TimerHandle | None = None
        self._rescue: asyncio.Task[None] | None = None

    def arm(self, paused_s: float, limit_s: float) -> None:
        """Breaks `limit_s` after the pause began (seconds since the epoch), unless disarmed before."""
        self.disarm()
        left_s = max(0.0, limit_s - (time.time() - paused_s))
        reason = f"the guest was paused for more than {limit_s:g} s"
        self._timer = asyncio.get_running_loop().call_later(left_s, self.break_off, reason)

    def disarm(self) -> None:
        """Takes the deadline back."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def cut(self) -> None:
        """Ends the stream at once, for QEMU too."""
        if self.stream is not None:
            self.stream.cut()

    async def close(self) -> None:
        """Gives up our end of the stream and all that is under way; the stream itself lives on with QEMU's end."""
        self.disarm()
        if self._rescue is not None:
            self._rescue.cancel()
            await asyncio.gather(self._rescue, return_exceptions=True)
            self._rescue = None
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def break_off(self, reason: str) -> None:
        """Breaks the transfer now."""
        self.reason = reason
        self._log.warning("stream cut", reason=reason)
        self.cut()
        self._on_break()
        # QEMU does not notice while it waits in pre-switchover.
        self._rescue = asyncio.create_task(self._cancel())

    async def _cancel(self) -> None:
        while True:
            with contextlib.suppress(HandoffError):
                await self._migration.cancel(CANCEL_TIMEOUT_S)
                return
            await asyncio.sleep(RETRY_S)
