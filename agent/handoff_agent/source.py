"""The source's side of a handoff: copies the memory, holds the guest paused once it is complete, runs it again if not.

QEMU and the agent talk like this (QEMU's states in brackets):

    StartTransfer     migrate                          [active]          TRANSFERRING
                      near the end of a pass: slow down                  READY
    SwitchOver        full speed                       [active]          SWITCHING
                      little is left: stop                               deadline armed
                      STOP event, the rest is sent     [pre-switchover]
                      migrate-continue                 [device]
                      everything is at the destination [completed]       HELD

A QEMU before 8.1 pauses the guest by itself after SwitchOver, or before it when it finds nothing dirty. The latter is
READY too, but the guest waits: it runs again when the order does not come within UNORDERED_PAUSE_S.
"""

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import Final

from handoff.agent.v1 import qemu_pb2 as pb
from handoff_agent.convergence import (
    Action,
    ConvergenceSettings,
    Sample,
    decide,
    expected_downtime_ms,
    next_look_s,
)
from handoff_agent.domains import end_domain, is_active, undefine
from handoff_agent.events import ConnectionEvent, Event, LifecycleEvent, MonitorEvent, Subscription
from handoff_agent.handoff import Handoff, Notify, Save, timestamp
from handoff_agent.ledger import Record
from handoff_agent.monitor import MigrationInfo, MigrationStatus, Monitor
from handoff_agent.outgoing import OutgoingMigration
from handoff_agent.rules import ABORTED, COPYING_STATES, FAILED, HELD, READY, RELEASED, SWITCHING, TRANSFERRING, Call
from handoff_agent.slots import Slot
from handoff_agent.stream import Stream
from handoff_common.errors import DeadlineError, HandoffError, NotFoundError, PreconditionError

UNORDERED_PAUSE_S: Final = 0.5
CANCEL_TIMEOUT_S: Final = 5.0
RESUME_TIMEOUT_S: Final = 10.0
# After SwitchOver QEMU may first only pause the guest for this share of the allowed time; most guests get by with it.
FIRST_SHARE_OF_DOWNTIME: Final = 1 / 20
FULL_LIMIT_AFTER_S: Final = 0.1
HELD_BACK_POLL_S: Final = 0.5
ORDERED_POLL_S: Final = 0.005
# Where QEMU waits for us, the end of a pass may be missed.
GATED_POLL_S: Final = 0.02
# More than QEMU does between two looks while it is held back, and a time after which it surely no longer is.
MOVES_BYTES: Final = 256 << 10
MOVES_PASSES: Final = 10
MOVES_AFTER_S: Final = 0.3
RETRY_S: Final = 0.2
MAX_SAMPLES: Final = 600

_RUNNING_STATUSES: Final = ("running", "io-error", "watchdog", "guest-panicked", "suspended", "shutdown")
"""QEMU's run states in which a guest is not waiting for us."""


class SourceHandoff(Handoff):
    """One guest that leaves. Its transfer is a task that outlives the call that began it."""

    def __init__(self, record: Record, save: Save, notify: Notify, slot: Slot) -> None:
        super().__init__(record, save, notify)
        self._slot = slot
        self._monitor = Monitor(slot, record.domain_uuid)
        self._migration = OutgoingMigration(self._monitor, record.bandwidth_bytes_per_s)
        self._stream: Stream | None = None
        self._events: Subscription | None = None
        self._job: asyncio.Task[None] | None = None
        self._rescue: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._samples: list[Sample] = []
        self._pass = 0
        self._pass_began = 0.0
        self._previous_pass_s = 0.0
        self._dirty_bytes_per_s = 0.0
        self._rate_bytes_per_s = 0.0
        self._next_look_s = 0.0
        self._held_back = False
        self._ordered_at = 0.0
        self._allowed_ms = 0
        self._stop_sent = False
        self._held_at: MigrationInfo | None = None
        self._paused = False
        self._stopped_s = 0.0
        self._continued = False
        self._over = False
        self._aborting = False
        self._cut_reason = ""

    # The leader's calls. Each holds the lock, and is repeatable.

    async def start_transfer(self, uri: str, limits: ConvergenceSettings, bandwidth: int, deadline_s: float) -> None:
        """Begins to copy to `uri`; on return QEMU sends, or the handoff has FAILED."""
        async with self.lock:
            if not self.permits(Call.START_TRANSFER):
                return
            await self.change(
                state=TRANSFERRING,
                downtime_limit_ms=limits.downtime_limit_ms,
                bandwidth_bytes_per_s=bandwidth,
                switch_deadline_s=deadline_s,
                started_s=time.time(),
            )
            self._migration = OutgoingMigration(self._monitor, bandwidth)
            begun = asyncio.Event()
            self._own(self._transfer(uri, begun))
            await begun.wait()

    async def switch_over(self) -> None:
        """Lets QEMU pause the guest and send the rest."""
        async with self.lock:
            if not self.permits(Call.SWITCH_OVER):
                return
            self._ordered_at = time.monotonic()
            await asyncio.gather(self.change(state=SWITCHING), self._go())
            if self._events is not None:
                self._events.wake()

    async def release(self) -> None:
        """Destroys the held copy and undefines the guest here."""
        async with self.lock:
            if not self.permits(Call.RELEASE):
                return
            await end_domain(self._slot, self.record.domain_uuid)
            await undefine(self._slot, self.record.domain_uuid)
            await self.change(state=RELEASED)

    async def abort(self, reason: str) -> None:
        """Cancels the transfer and makes sure that the guest runs. Raises DeadlineError when QEMU does not let go."""
        async with self.lock:
            if not self.permits(Call.ABORT):
                return
            await self._end_transfer()
            was_held = self.state == HELD
            if await self._run_again() or not was_held:
                await self._tidy()
                await self.change(state=ABORTED, message=reason)
            else:
                await self.change(state=FAILED, message="the held copy is gone: its QEMU ended at the source")

    def adopt(self) -> None:
        """Takes up what an earlier life of this agent began."""
        if self.state in COPYING_STATES:
            self._ordered_at = time.monotonic() if self.state == SWITCHING else 0.0
            self._held_back = self.state == READY
            self._own(self._rejoin())

    async def detach(self) -> None:
        """Ends the agent's work on it, for the agent's own end. QEMU goes on as it is."""
        self._disarm()
        for task in (self._job, self._rescue):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    # The transfer, from its beginning to HELD or FAILED.

    def _own(self, work: Coroutine[None, None, None]) -> None:
        self._job = asyncio.create_task(work, name=f"source-{self.record.migration_id}")

    async def _transfer(self, uri: str, begun: asyncio.Event) -> None:
        with self._slot.events(self.record.domain_uuid) as events:
            try:
                self._stream = await Stream.connect(uri)
                await self._migration.begin(self._stream.fileno())
            except HandoffError as error:
                await self._fail(f"the transfer could not begin: {error.message}")
                return
            finally:
                begun.set()
            await self._drive(events)

    async def _rejoin(self) -> None:
        with self._slot.events(self.record.domain_uuid) as events:
            await self._drive(events)

    async def _drive(self, events: Subscription) -> None:
        self._events = events
        while not self._over:
            event = await events.next_within(self._next_look_s)
            try:
                await self._advance(event)
            except HandoffError as error:
                self.log.warning("transfer", error=error.message)
                self._next_look_s = RETRY_S
                await self._notice_end()

    async def _notice_end(self) -> None:
        with contextlib.suppress(HandoffError):
            if not await is_active(self._slot, self.record.domain_uuid):
                await self._fail(f"guest {self.record.domain_name} ended at the source: its QEMU is gone")

    async def _advance(self, event: Event | None) -> None:
        match event:
            case None | ConnectionEvent(connected=True):
                await self._look()
            case MonitorEvent(event="STOP"):
                self._stopped_s = event.time_s
            case MonitorEvent(event="MIGRATION"):
                await self._act(MigrationStatus.parse(str(event.data.get("status"))))
            case LifecycleEvent(kind="stopped" | "crashed"):
                await self._notice_end()

    async def _look(self) -> None:
        info = await self._migration.query()
        completed = info.status is MigrationStatus.COMPLETED
        if completed and await self._monitor.query_status(urgent=True) in _RUNNING_STATUSES:
            # Of an earlier handoff, after which the guest ran on: this one never began.
            await self._on_broken()
        else:
            await self._act(info.status)
        if self._over:
            return
        if self._paused or self._stop_sent:
            self._next_look_s = HELD_BACK_POLL_S
        elif info.status is MigrationStatus.ACTIVE:
            await self._judge(info)
        else:
            self._next_look_s = ORDERED_POLL_S
        if self._ordered_at:
            await self._go()

    async def _act(self, status: MigrationStatus) -> None:
        match status:
            case MigrationStatus.PRE_SWITCHOVER:
                await self._on_pause()
            case MigrationStatus.COMPLETED:
                await self._on_completed()
            case MigrationStatus.FAILED | MigrationStatus.CANCELLED | MigrationStatus.NONE:
                await self._on_broken()

    async def _judge(self, info: MigrationInfo) -> None:
        sample = self._sample(info)
        settings = ConvergenceSettings(self.record.downtime_limit_ms)
        self._samples = [*self._samples[-MAX_SAMPLES:], sample]
        decision = decide(self._samples, settings)
        if not self._held_back and not self._ordered_at:
            self._rate_bytes_per_s = sample.rate_bytes_per_s
        self.progress = _progress(info, sample, decision.reason)
        if self._ordered_at:
            self._next_look_s = ORDERED_POLL_S
            await self._stop_if_little_is_left(info)
        elif decision.action is Action.READY:
            self._next_look_s = HELD_BACK_POLL_S
            if not self._held_back:
                await self._migration.hold()
                self._held_back = True
            if self.state == TRANSFERRING:
                await self.change(state=READY)
        else:
            shortest_s = GATED_POLL_S if await self._migration.is_gated() else 0.0
            self._next_look_s = max(next_look_s(sample, settings), shortest_s)
            if self._held_back:
                await self._migration.go_on()
                self._held_back = False
            if self.state == READY:
                await self.change(state=TRANSFERRING)

    def _sample(self, info: MigrationInfo) -> Sample:
        now = time.monotonic()
        if info.iterations != self._pass:
            self._previous_pass_s = now - self._pass_began
            self._pass, self._pass_began = info.iterations, now
            if info.iterations > 1:
                self._dirty_bytes_per_s = info.ram_remaining_bytes / max(self._previous_pass_s, 0.001)
        # While the copy is held back QEMU's throughput is that of the holding.
        throughput = int(self._rate_bytes_per_s) if self._held_back else info.throughput_bytes_per_s
        return Sample(
            elapsed_s=info.total_ms / 1000,
            pass_elapsed_s=now - self._pass_began,
            ram_total_bytes=info.ram_total_bytes,
            ram_transferred_bytes=info.ram_transferred_bytes,
            ram_remaining_bytes=info.ram_remaining_bytes,
            throughput_bytes_per_s=throughput,
            dirty_bytes_per_s=info.dirty_bytes_per_s or int(self._dirty_bytes_per_s),
            iterations=info.iterations,
            cpu_throttle_percent=info.cpu_throttle_percent,
        )

    # The switch.

    async def _go(self) -> None:
        """Does what is still missing of an ordered switch; called again until the guest is paused and sent."""
        if self._over or self._continued:
            return
        try:
            if self._paused:
                self._arm(self.record.switch_deadline_s)
                self._continued = True
                await self._migration.switch()
            elif not self._allowed_ms:
                if self._held_back:
                    self._held_at = await self._migration.query()
                await self._allow(max(1, int(self.record.downtime_limit_ms * FIRST_SHARE_OF_DOWNTIME)))
            elif (
                self._allowed_ms < self.record.downtime_limit_ms
                and time.monotonic() - self._ordered_at > FULL_LIMIT_AFTER_S
            ):
                await self._allow(self.record.downtime_limit_ms)
        except HandoffError as error:
            self._continued = False
            self._next_look_s = RETRY_S
            self.log.warning("switch", error=error.message)

    async def _stop_if_little_is_left(self, info: MigrationInfo) -> None:
        """Pauses the guest once what is left fits. QEMU looks for dirty pages all the time near the end of a pass."""
        if self._stop_sent or not self._allowed_ms or not await self._migration.is_gated():
            return
        # It is held back for up to 100 ms after the order; a guest stopped before that would wait for it.
        moves = (
            self._held_at is None
            or info.ram_transferred_bytes > self._held_at.ram_transferred_bytes + MOVES_BYTES
            or info.iterations > self._held_at.iterations + MOVES_PASSES
            or time.monotonic() - self._ordered_at > MOVES_AFTER_S
        )
        left_ms = 1000 * info.ram_remaining_bytes / max(self._rate_bytes_per_s, 1.0)
        if moves and left_ms <= self._allowed_ms:
            self._stop_sent = True
            self._stopped_s = time.time()
            self._arm(self.record.switch_deadline_s)
            await self._migration.stop()

    async def _allow(self, downtime_ms: int) -> None:
        await self._migration.allow_pause(downtime_ms, self._rate_bytes_per_s)
        self._allowed_ms = downtime_ms

    async def _on_pause(self) -> None:
        if not self._paused:
            self._paused = True
            self._stopped_s = self._stopped_s or time.time()
            if not self._ordered_at:
                self._arm(UNORDERED_PAUSE_S)
                if self.state == TRANSFERRING:
                    await self.change(state=READY)
        if self._ordered_at:
            await self._go()

    async def _on_completed(self) -> None:
        self._over = True
        self._disarm()
        held_s = time.time()
        paused_s = self._stopped_s or held_s
        await self.change(
            state=HELD, message="", paused_s=paused_s, paused_to_held_ms=max(0.0, 1000 * (held_s - paused_s))
        )
        self._close_stream()
        with contextlib.suppress(HandoffError):
            info = await self._migration.query()
            await self.change(qemu_downtime_ms=info.downtime_ms)

    async def _on_broken(self) -> None:
        self._over = True
        self._disarm()
        if self._aborting:
            return
        reason = self._cut_reason
        if not reason:
            with contextlib.suppress(HandoffError):
                reason = (await self._migration.query()).error_desc
        await self._fail(f"the transfer broke: {reason or 'QEMU gives no reason'}")

    def _arm(self, limit_s: float) -> None:
        """Breaks the stream `limit_s` after the pause. A guest that its user had paused loses nothing by waiting."""
        self._disarm()
        if self.record.was_running:
            left_s = max(0.0, limit_s - (time.time() - self._stopped_s))
            reason = f"the guest was paused for more than {limit_s:g} s"
            self._deadline = asyncio.get_running_loop().call_later(left_s, self._cut, reason)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _cut(self, reason: str) -> None:
        """Gets the guest running again, whatever QEMU is blocked in."""
        self._cut_reason = reason
        self.log.warning("stream cut", reason=reason)
        if self._stream is not None:
            self._stream.cut()
        # QEMU does not notice while it waits in pre-switchover.
        self._rescue = asyncio.create_task(self._cancel_migration())

    async def _cancel_migration(self) -> None:
        while not self._over:
            with contextlib.suppress(HandoffError):
                await self._migration.cancel(CANCEL_TIMEOUT_S)
                return
            await asyncio.sleep(RETRY_S)

    async def _fail(self, message: str) -> None:
        self._over = True
        self._disarm()
        self._close_stream()
        try:
            await self._run_again()
            await self._tidy()
        except HandoffError as error:
            message = f"{message}; {error.message}"
        await self.change(state=FAILED, message=message)

    # Getting back.

    async def _end_transfer(self) -> None:
        """Cancels the transfer and waits for its end. Raises DeadlineError when QEMU does not let go."""
        if self._job is None or self._job.done():
            return
        self._aborting = True
        with contextlib.suppress(HandoffError):
            await self._migration.cancel(CANCEL_TIMEOUT_S)
        done, _ = await asyncio.wait({self._job}, timeout=CANCEL_TIMEOUT_S)
        if not done and self._stream is not None:
            self._stream.cut()
        done, _ = await asyncio.wait({self._job}, timeout=CANCEL_TIMEOUT_S)
        self._aborting = False
        if not done:
            raise DeadlineError(
                f"guest {self.record.domain_name}: its QEMU does not give the migration up; look at it with"
                f" virsh domstate, and try again"
            )
        self._close_stream()

    async def _run_again(self) -> bool:
        """Makes sure that the guest runs, if it ran before; tells whether it is still here.

        Raises DeadlineError when QEMU doesn't run it within 10 s, and as Slot.call does.
        """
        deadline = time.monotonic() + RESUME_TIMEOUT_S
        with self._slot.events(self.record.domain_uuid) as events:
            while await is_active(self._slot, self.record.domain_uuid):
                if not self.record.was_running or await self._monitor.query_status(urgent=True) in _RUNNING_STATUSES:
                    return True
                if time.monotonic() > deadline:
                    raise DeadlineError(
                        f"guest {self.record.domain_name} is paused at the source and does not resume; try virsh resume"
                    )
                # "already running" when QEMU was faster; libvirt's refusal of a moment passes.
                with contextlib.suppress(PreconditionError, NotFoundError):
                    await self._slot.on_domain(self.record.domain_uuid, lambda domain: domain.resume(), urgent=True)
                await events.next_within(RETRY_S)
        return False

    async def _tidy(self) -> None:
        """Gives back what the handoff changed; what can't be given back is logged, for it does not harm the guest."""
        self._close_stream()
        try:
            if self.record.started_s:
                await self._migration.tidy()
            if self.record.autostart:
                await self._slot.on_domain(self.record.domain_uuid, lambda domain: domain.setAutostart(1))
        except HandoffError as error:
            self.log.warning("could not tidy up", error=error.message)

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _progress(info: MigrationInfo, sample: Sample, reason: str) -> pb.TransferProgress:
    return pb.TransferProgress(
        time=timestamp(time.time()),
        ram_total_bytes=info.ram_total_bytes,
        ram_transferred_bytes=info.ram_transferred_bytes,
        ram_remaining_bytes=info.ram_remaining_bytes,
        throughput_bytes_per_s=info.throughput_bytes_per_s or int(sample.rate_bytes_per_s),
        dirty_bytes_per_s=sample.dirty_bytes_per_s,
        iterations=info.iterations,
        cpu_throttle_percent=info.cpu_throttle_percent,
        expected_downtime_ms=int(expected_downtime_ms(sample) or 0),
        elapsed_ms=info.total_ms,
        decision=reason,
    )
