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

When the memory is passed on ("cpr:…"), the other QEMU is on this host, and its side of the handoff in this agent:

    StartTransfer     migrate: the descriptors are sent [setup]          TRANSFERRING
                      the new QEMU has started                           READY
    SwitchOver        the new QEMU is told to listen                     SWITCHING
                      STOP event, the devices are sent   [active]        deadline armed
                                                         [completed]     HELD
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Final, Protocol

from handoff_agent.breaker import CANCEL_TIMEOUT_S, RETRY_S, Breaker
from handoff_agent.convergence import Action, ConvergenceSettings, Sample, decide, next_look_s
from handoff_agent.domains import end_domain, is_active, is_running, run_again, undefine
from handoff_agent.events import ConnectionEvent, Event, LifecycleEvent, MonitorEvent, Subscription
from handoff_agent.handoff import Changes, Handoff, Notify, Save
from handoff_agent.ledger import Record
from handoff_agent.local_sockets import CPR
from handoff_agent.meter import Meter, final_progress, progress
from handoff_agent.monitor import MigrationInfo, MigrationStatus, Monitor, QmpError
from handoff_agent.outgoing import OutgoingMigration
from handoff_agent.rules import (
    ABORTED,
    COPYING_STATES,
    FAILED,
    HELD,
    PREPARED,
    READY,
    RELEASED,
    SWITCHING,
    TRANSFERRING,
    Call,
    State,
)
from handoff_agent.slots import Slot
from handoff_agent.stream import Stream
from handoff_common.errors import DeadlineError, HandoffError, UnavailableError

UNORDERED_PAUSE_S: Final = 0.5
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
MAX_SAMPLES: Final = 600
ASK_AGAIN_S: Final = 5.0


class Receiver(Protocol):
    """The destination's side, where it is in the same agent."""

    async def is_started(self) -> bool:
        """Its QEMU has the memory and answers. Raises HandoffError when it has ended instead."""

    async def accept(self) -> None:
        """Lets its QEMU take the devices' state: the source's QEMU pauses the guest at once."""


class SourceHandoff(Handoff):
    """One guest that leaves. Its transfer is a task that outlives the call that began it."""

    def __init__(
        self, record: Record, save: Save, notify: Notify, slot: Slot, receiver: Callable[[], Receiver]
    ) -> None:
        """`receiver` raises NotFoundError when the destination's side is not in this agent."""
        super().__init__(record, save, notify)
        self._slot = slot
        self._receiver = receiver
        self._monitor = Monitor(slot, record.domain_uuid)
        self._migration = OutgoingMigration(self._monitor, record.bandwidth_bytes_per_s)
        self._breaker = Breaker(self._migration, self.log)
        self._meter = Meter()
        self._samples: list[Sample] = []
        self._events: Subscription | None = None
        self._job: asyncio.Task[None] | None = None
        self._next_look_s = 0.0
        self._held_back = False
        self._held_at: MigrationInfo | None = None
        self._ordered_at = 0.0
        self._allowed_ms = 0
        self._stop_sent = False
        self._stopped_s = 0.0
        self._pause_over = (0.0, 0.0)
        self._paused = False
        self._continued = False
        self._accepted_s = 0.0
        self._over = False
        self._aborting = False

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
                passes_on=uri.startswith(CPR),
                started_s=time.time(),
            )
            self._migration = OutgoingMigration(self._monitor, bandwidth)
            self._breaker = Breaker(self._migration, self.log)
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
            if await self._is_back() or not was_held:
                changes = self._ended(ABORTED, reason)
                await self._tidy()
                await self.change(**changes)
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
        if self._job is not None:
            self._job.cancel()
            await asyncio.gather(self._job, return_exceptions=True)
        await self._breaker.close()

    # The transfer, from its beginning to HELD or FAILED.

    def _own(self, work: Coroutine[None, None, None]) -> None:
        self._job = asyncio.create_task(work, name=f"source-{self.record.migration_id}")

    async def _transfer(self, uri: str, begun: asyncio.Event) -> None:
        with self._slot.events(self.record.domain_uuid) as events:
            try:
                if self.record.passes_on:
                    await self._migration.pass_on(uri.removeprefix(CPR))
                else:
                    stream = self._breaker.stream = await Stream.connect(uri)
                    await self._migration.begin(stream.fileno())
            except HandoffError as error:
                await self._fail(f"the transfer could not begin: {error.message}")
                return
            finally:
                begun.set()
            await self._drive(events)

    async def _rejoin(self) -> None:
        with self._slot.events(self.record.domain_uuid) as events:
            if self.state == TRANSFERRING:
                # Until this is known, the leader's repeated order waits for the lock.
                async with self.lock:
                    if await self._never_began():
                        await self.change(state=PREPARED)
                        return
            elif self.state == SWITCHING:
                await self._find_pause()
            await self._drive(events)

    async def _find_pause(self) -> None:
        """A guest that was paused for the switch has its deadline from now on."""
        with contextlib.suppress(HandoffError):
            if self.record.was_running and not await is_running(self._monitor):
                self._stop_sent, self._stopped_s = True, time.time()
                self._arm(self.record.switch_deadline_s)

    async def _never_began(self) -> bool:
        """Whether the agent died between its own record and QEMU's `migrate`."""
        while True:
            try:
                # COMPLETED is of the handoff that the guest came here by: ours needs an order before it can end.
                return (await self._migration.query()).status in (MigrationStatus.NONE, MigrationStatus.COMPLETED)
            except (UnavailableError, DeadlineError):
                await self._slot.wait_connected(ASK_AGAIN_S)
                await asyncio.sleep(RETRY_S)
            except HandoffError:
                return False

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
                if self.record.passes_on and not self._over:
                    self._paused = True
                    self._arm(self.record.switch_deadline_s)
            case MonitorEvent(event="RESUME"):
                self._pause_over = (self._stopped_s, event.time_s)
                self._stopped_s = 0.0
            case MonitorEvent(event="MIGRATION"):
                await self._act(MigrationStatus.parse(str(event.data.get("status"))))
            case LifecycleEvent(kind="stopped" | "crashed"):
                await self._notice_end()

    async def _look(self) -> None:
        info = await self._migration.query()
        completed = info.status is MigrationStatus.COMPLETED
        if completed and await is_running(self._monitor):
            # Of an earlier handoff, after which the guest ran on: this one never began.
            await self._on_broken()
        else:
            await self._act(info.status)
        if self._over:
            return
        if self._paused or self._stop_sent:
            self._next_look_s = HELD_BACK_POLL_S
        elif self.record.passes_on:
            await self._await_receiver()
        elif info.status is MigrationStatus.ACTIVE:
            await self._judge(info)
        else:
            self._next_look_s = ORDERED_POLL_S
        if self._ordered_at:
            await self._go()

    async def _await_receiver(self) -> None:
        self._next_look_s = GATED_POLL_S if self.state == TRANSFERRING else HELD_BACK_POLL_S
        if self.state != TRANSFERRING:
            return
        try:
            started = await self._receiver().is_started()
        except HandoffError as error:
            self._breaker.break_off(f"the new QEMU did not start: {error.message}")
            return
        if started:
            await self.change(state=READY)

    async def _act(self, status: MigrationStatus) -> None:
        match status:
            case MigrationStatus.PRE_SWITCHOVER:
                await self._on_pause()
            case MigrationStatus.COMPLETED:
                await self._on_completed()
            case MigrationStatus.FAILED | MigrationStatus.CANCELLED | MigrationStatus.NONE:
                await self._on_broken()

    async def _judge(self, info: MigrationInfo) -> None:
        sample = self._meter.sample(info, full_speed=not self._held_back and not self._ordered_at)
        settings = ConvergenceSettings(self.record.downtime_limit_ms)
        self._samples = [*self._samples[-MAX_SAMPLES:], sample]
        decision = decide(self._samples, settings)
        self.progress = progress(info, sample, decision.reason)
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

    # The switch.

    async def _go(self) -> None:
        """Does what is still missing of an ordered switch; called again until the guest is paused and sent."""
        if self._over or self._continued:
            return
        if self.record.passes_on:
            self._continued = True
            self._accepted_s = time.time()
            try:
                await self._receiver().accept()
            except HandoffError as error:
                self._breaker.break_off(f"the new QEMU does not take the guest: {error.message}")
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
        left_ms = 1000 * info.ram_remaining_bytes / max(self._meter.rate_bytes_per_s, 1.0)
        if moves and left_ms <= self._allowed_ms:
            self._stop_sent = True
            self._stopped_s = time.time()
            self._arm(self.record.switch_deadline_s)
            try:
                await self._migration.stop()
            except QmpError:
                self._stop_sent, self._stopped_s = False, 0.0
                self._breaker.disarm()
                raise

    async def _allow(self, downtime_ms: int) -> None:
        await self._migration.allow_pause(downtime_ms, self._meter.rate_bytes_per_s)
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
        self._breaker.disarm()
        held_s = time.time()
        # QEMU may have passed the guest on before its STOP is heard; it was not paused before this.
        paused_s = self._stopped_s or self._accepted_s or held_s
        await self.change(
            state=HELD, message="", paused_s=paused_s, paused_to_held_ms=max(0.0, 1000 * (held_s - paused_s))
        )
        await self._breaker.close()
        with contextlib.suppress(HandoffError):
            info = await self._migration.query()
            self.progress = final_progress(self.progress, info)
            await self.change(qemu_downtime_ms=info.downtime_ms)

    async def _on_broken(self) -> None:
        self._over = True
        self._breaker.disarm()
        if self._aborting:
            return
        reason = self._breaker.reason
        if not reason:
            with contextlib.suppress(HandoffError):
                reason = (await self._migration.query()).error_desc
        await self._fail(f"the transfer broke: {reason or 'QEMU gives no reason'}")

    def _arm(self, limit_s: float) -> None:
        """A guest that its user had paused loses nothing by waiting."""
        if self.record.was_running:
            self._breaker.arm(self._stopped_s, limit_s)

    async def _fail(self, message: str) -> None:
        """FAILED means that the guest runs here: it is said once that is known."""
        self._over = True
        self._breaker.cut()
        await self._breaker.close()
        while True:
            try:
                await self._is_back()
            except (DeadlineError, UnavailableError) as error:
                self.log.warning("can't see whether the guest runs", error=error.message)
                await self._slot.wait_connected(ASK_AGAIN_S)
                await asyncio.sleep(RETRY_S)
                continue
            except HandoffError as error:
                message = f"{message}; {error.message}"
            break
        changes = self._ended(FAILED, message)
        await self._tidy()
        await self.change(**changes)

    # Getting back.

    async def _end_transfer(self) -> None:
        """Cancels the transfer and waits for its end. Raises DeadlineError when QEMU does not let go."""
        if self._job is None or self._job.done():
            return
        self._aborting = True
        try:
            with contextlib.suppress(HandoffError):
                await self._migration.cancel(CANCEL_TIMEOUT_S)
            done, _ = await asyncio.wait({self._job}, timeout=CANCEL_TIMEOUT_S)
            if not done:
                self._breaker.cut()
                done, _ = await asyncio.wait({self._job}, timeout=CANCEL_TIMEOUT_S)
        finally:
            self._aborting = False
        if not done:
            raise DeadlineError(
                f"guest {self.record.domain_name}: its QEMU does not give the migration up; look at it with"
                " virsh domstate, and try again"
            )

    async def _is_back(self) -> bool:
        """Makes sure that the guest runs if it ran before; tells whether it is still here. Raises as run_again does."""
        uuid = self.record.domain_uuid
        return await (run_again(self._slot, uuid) if self.record.was_running else is_active(self._slot, uuid))

    def _ended(self, state: State, message: str) -> Changes:
        """The end of a handoff after which the guest runs here, with the pause that has just ended, if any."""
        changes = Changes(state=state, message=message)
        paused_s, resumed_s = self._stopped_s or self.record.paused_s, time.time()
        if not paused_s:
            paused_s, resumed_s = self._pause_over
        if self.record.was_running and paused_s and not self.record.paused_to_resumed_ms:
            changes["paused_s"] = paused_s
            changes["paused_to_resumed_ms"] = max(0.0, 1000 * (resumed_s - paused_s))
        return changes

    async def _tidy(self) -> None:
        """Gives back what the handoff changed; what can't be given back is logged, for it does not harm the guest."""
        await self._breaker.close()
        try:
            if self.record.autostart:
                await self._slot.on_domain(self.record.domain_uuid, lambda domain: domain.setAutostart(1))
            if self.record.started_s and await is_active(self._slot, self.record.domain_uuid):
                await self._migration.tidy()
        except HandoffError as error:
            self.log.warning("could not tidy up", error=error.message)
