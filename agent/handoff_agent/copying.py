"""The memory is copied over a socket while the guest runs, pass by pass, until what is left fits the pause.

    begin     migrate                                 [active]
    look      what is left fits the pause                      READY
              no order comes: slow down
    go        full speed
    look      little is left: stop
              STOP event, the rest is sent            [pre-switchover]
    go        migrate-continue                        [device], [completed]

A QEMU before 8.1 pauses the guest by itself after the order, or before it when it finds nothing dirty.
"""

import time
from typing import Final

from handoff_agent.channels import LocalChannels
from handoff_agent.convergence import Action, ConvergenceSettings, Sample, decide, next_look_s
from handoff_agent.local_sockets import MULTIFD
from handoff_agent.meter import Meter, progress
from handoff_agent.monitor import MigrationInfo, MigrationStatus, QmpError
from handoff_agent.outgoing import OutgoingMigration
from handoff_agent.stream import Connection, Stream
from handoff_agent.transfer import GATED_POLL_S, ORDERED_POLL_S, READY_POLL_S, Switch
from handoff_common.errors import HandoffError

# After the order QEMU may first only pause the guest for this share of the allowed time; most guests get by with it.
FIRST_SHARE_OF_DOWNTIME: Final = 1 / 20
FULL_LIMIT_AFTER_S: Final = 0.1
# A copy that was slowed down goes on only with QEMU's next window of 100 ms; mostly the order comes at once.
SLOW_DOWN_AFTER_S: Final = 1.0
# More than QEMU does between two looks while it is held back, and a time after which it surely no longer is.
MOVES_BYTES: Final = 256 << 10
MOVES_PASSES: Final = 10
MOVES_AFTER_S: Final = 0.3
MAX_SAMPLES: Final = 600


class Copying:
    """The copy of one guest's memory."""

    def __init__(self, switch: Switch, migration: OutgoingMigration, *, held_back: bool) -> None:
        """`held_back`: an earlier life of the agent has slowed it down."""
        self._switch = switch
        self._migration = migration
        self._meter = Meter()
        self._samples: list[Sample] = []
        self._held_back = held_back
        self._held_at: MigrationInfo | None = None
        self._ready_s = 0.0
        self._allowed_ms = 0
        self._continued = False

    async def begin(self, uri: str) -> Connection:
        """Copies to "tcp:…", "unix:…" or "multifd:…"."""
        if uri.startswith(MULTIFD):
            path = uri.removeprefix(MULTIFD)
            await self._migration.begin_multifd(path)
            return LocalChannels(path)
        stream = await Stream.connect(uri)
        try:
            await self._migration.begin(stream.fileno())
        except BaseException:
            stream.close()
            raise
        return stream

    async def look(self, info: MigrationInfo) -> float:
        """Slows the copy down, or speeds it up; stops the guest when that was ordered and little is left."""
        if info.status is not MigrationStatus.ACTIVE:
            return ORDERED_POLL_S
        sample = self._meter.sample(info, full_speed=not self._held_back and not self._switch.ordered_at)
        settings = ConvergenceSettings(self._switch.record.downtime_limit_ms)
        self._samples = [*self._samples[-MAX_SAMPLES:], sample]
        decision = decide(self._samples, settings)
        self._switch.progress = progress(info, sample, decision.reason)
        if self._switch.ordered_at:
            await self._stop_if_little_is_left(info)
            return ORDERED_POLL_S
        if decision.action is Action.READY:
            self._ready_s = self._ready_s or time.monotonic()
            if not self._held_back and await self._must_wait():
                await self._migration.hold(info.cpu_throttle_percent)
                self._held_back = True
            await self._switch.say_ready(ready=True)
            return READY_POLL_S
        self._ready_s = 0.0
        if self._held_back:
            await self._migration.go_on()
            self._held_back = False
        await self._switch.say_ready(ready=False)
        # Where QEMU waits for us, the end of a pass may be missed.
        shortest_s = GATED_POLL_S if await self._migration.is_gated() else 0.0
        return max(next_look_s(sample, settings), shortest_s)

    async def go(self) -> None:
        """Allows QEMU a pause, first a short one; lets it send the rest once the guest is paused."""
        if self._continued:
            return
        if self._switch.is_paused:
            if self._switch.may_continue():
                await self._continue()
        elif not self._allowed_ms:
            if self._held_back:
                self._held_at = await self._migration.query()
            await self._allow(max(1, int(self._switch.record.downtime_limit_ms * FIRST_SHARE_OF_DOWNTIME)))
        elif self._allowed_ms < self._full_limit_ms() and self._since_order_s() > FULL_LIMIT_AFTER_S:
            await self._allow(self._full_limit_ms())

    async def _must_wait(self) -> bool:
        """Whether to slow down for the order: at once where QEMU may pause the guest by itself."""
        return time.monotonic() - self._ready_s > SLOW_DOWN_AFTER_S or not await self._migration.is_gated()

    async def _continue(self) -> None:
        self._continued = True
        try:
            await self._migration.switch()
        except HandoffError:
            self._continued = False
            raise

    async def _stop_if_little_is_left(self, info: MigrationInfo) -> None:
        """Pauses the guest once what is left fits. QEMU looks for dirty pages all the time near the end of a pass."""
        if not self._allowed_ms or not await self._migration.is_gated():
            return
        # It is held back for up to 100 ms after the order; a guest stopped before that would wait for it.
        moves = (
            self._held_at is None
            or info.ram_transferred_bytes > self._held_at.ram_transferred_bytes + MOVES_BYTES
            or info.iterations > self._held_at.iterations + MOVES_PASSES
            or self._since_order_s() > MOVES_AFTER_S
        )
        left_ms = 1000 * info.ram_remaining_bytes / max(self._meter.rate_bytes_per_s, 1.0)
        if moves and left_ms <= self._allowed_ms:
            if not await self._switch.before_stop():
                return
            self._switch.stopping()
            try:
                await self._migration.stop()
            except QmpError:
                self._switch.not_stopped()
                raise

    async def _allow(self, downtime_ms: int) -> None:
        await self._migration.allow_pause(downtime_ms, self._meter.rate_bytes_per_s)
        self._allowed_ms = downtime_ms

    def _full_limit_ms(self) -> int:
        return self._switch.record.downtime_limit_ms

    def _since_order_s(self) -> float:
        return time.monotonic() - self._switch.ordered_at
