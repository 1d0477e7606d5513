"""The source's side of a handoff: sends the guest, holds it paused once all is sent, runs it again if not.

QEMU and the agent talk like this (QEMU's states in brackets); how the memory is sent is in copying.py and passing.py:

    StartTransfer     what goes beside the memory is begun             TRANSFERRING
                      migrate                          [active]
                      QEMU can go over at once                         READY
    SwitchOver        the guest may be paused          [active]        SWITCHING
                      STOP event, the rest is sent                     deadline armed
                      everything is at the destination [completed]     HELD

A QEMU that pauses the guest unasked, as those before 8.1 may, is READY too, but the guest waits: it runs again when the
order does not come within UNORDERED_PAUSE_S.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Final

from handoff.agent.v1.disk_pb2 import DiskMove
from handoff_agent.breaker import CANCEL_TIMEOUT_S, RETRY_S, Breaker
from handoff_agent.channels import LocalChannels
from handoff_agent.companions import SourceCompanion, each, together
from handoff_agent.convergence import ConvergenceSettings
from handoff_agent.copying import Copying
from handoff_agent.disks.moves import recorded
from handoff_agent.domains import end_domain, is_active, is_running, run_again, undefine, user_runs_it
from handoff_agent.events import ConnectionEvent, Event, LifecycleEvent, MonitorEvent, Subscription
from handoff_agent.handoff import Changes, Handoff, Notify, Save
from handoff_agent.ledger import Record
from handoff_agent.local_sockets import MULTIFD
from handoff_agent.meter import final_progress
from handoff_agent.monitor import MigrationStatus, Monitor
from handoff_agent.outgoing import OutgoingMigration
from handoff_agent.passing import Passing, Receiver
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
from handoff_agent.transfer import READY_POLL_S, Transfer
from handoff_common.errors import DeadlineError, HandoffError, UnavailableError

UNORDERED_PAUSE_S: Final = 0.5
ASK_AGAIN_S: Final = 5.0
# How long a guest that is to run again waits, at the most, for what was turned back before it.
BACK_PATIENCE_S: Final = 0.5
BEFORE_STOP_TIMEOUT_S: Final = 0.5


class SourceHandoff(Handoff):
    """One guest that leaves. Its transfer is a task that outlives the call that began it."""

    def __init__(
        self, record: Record, save: Save, notify: Notify, slot: Slot, receiver: Callable[[], Receiver]
    ) -> None:
        """`receiver` raises NotFoundError when the destination's side is not in this agent."""
        super().__init__(record, save, notify)
        self.companions: Sequence[SourceCompanion] = ()
        self._slot = slot
        self._receiver = receiver
        self._monitor = Monitor(slot, record.domain_uuid)
        self._events: Subscription | None = None
        self._job: asyncio.Task[None] | None = None
        self._beginning: asyncio.Task[None] | None = None
        self._pausing: asyncio.Task[None] | None = None
        self._turning_back: asyncio.Task[HandoffError | None] | None = None
        self._next_look_s = 0.0
        self._is_prepared = False
        self._begun = False
        self._ordered_at = 0.0
        self._went_s = 0.0
        self._is_near_stop = False
        self._stopping = False
        self._stopped_s = 0.0
        self._pause_over = (0.0, 0.0)
        self._paused = False
        self._over = False
        self._aborting = False
        self._set_out()

    def _set_out(self) -> None:
        """Makes what depends on how the transfer was ordered."""
        self._migration = OutgoingMigration(self._monitor, self.record.bandwidth_bytes_per_s)
        self._breaker = Breaker(self._migration, self.log, self._on_break)
        self._way: Transfer
        if self.record.passes_on:
            self._way = Passing(self, self._migration, self._receiver)
        else:
            self._way = Copying(self, self._migration, held_back=self.state == READY)

    # The leader's calls. Each holds the lock, and is repeatable.

    async def prepare(self) -> None:
        """Turns autostart off and tells the companions; FAILED when that can't be, with the reason, which is raised.

        May be repeated: an earlier life of the agent may have died in the middle of it.
        """
        async with self.lock:
            if self._is_prepared or self.state != PREPARED:
                return
            failed = ""
            try:
                if self.record.autostart:
                    # Its host, when it is started again, must not run what is held.
                    failed = "autostart could not be turned off: "
                    await self._slot.on_domain(self.record.domain_uuid, lambda domain: domain.setAutostart(0))
                    failed = ""
                await together(companion.leaving() for companion in self.companions)
            except HandoffError as error:
                await self.change(state=FAILED, message=f"{failed}{error.message}")
                raise
            self._is_prepared = True

    async def start_transfer(
        self,
        uri: str,
        limits: ConvergenceSettings,
        bandwidth: int,
        deadline_s: float,
        disks: Sequence[DiskMove] = (),
        tunnel_address: str = "",
    ) -> None:
        """Begins to send to `uri`; on return QEMU sends, or the handoff has FAILED, or its companions are at work.

        `tunnel_address`: where the guest's frames go from the pause on, if the destination told.
        """
        async with self.lock:
            if not self.permits(Call.START_TRANSFER):
                return
            await self.change(
                state=TRANSFERRING,
                downtime_limit_ms=limits.downtime_limit_ms,
                bandwidth_bytes_per_s=bandwidth,
                switch_deadline_s=deadline_s,
                transfer_uri=uri,
                tunnel_address=tunnel_address,
                started_s=time.time(),
                disks=recorded(disks) if disks else self.record.disks,
            )
            self._set_out()
            under_way = asyncio.Event()
            self._own(self._transfer(under_way))
            await under_way.wait()

    async def switch_over(self) -> None:
        """Lets QEMU pause the guest and send the rest."""
        async with self.lock:
            if not self.permits(Call.SWITCH_OVER):
                return
            await self._follow_user()
            if not self.permits(Call.SWITCH_OVER):  # the transfer may have broken meanwhile
                return
            await asyncio.gather(self.change(state=SWITCHING), self._order())
            self._wake_up()

    async def release(self, *, keep_disks: bool = False) -> None:
        """Destroys the held copy and undefines the guest here. Raises what a companion raises; repeat it then.

        `keep_disks`: images that were copied stay.
        """
        async with self.lock:
            if not self.permits(Call.RELEASE):
                return
            await self.change(keep_disks=keep_disks)
            await end_domain(self._slot, self.record.domain_uuid, self.record.domain_name)
            await undefine(self._slot, self.record.domain_uuid)
            await each((companion.released() for companion in self.companions), self.log)
            await self.change(state=RELEASED)

    async def abort(self, reason: str) -> None:
        """Cancels the transfer and makes sure that the guest runs.

        Raises DeadlineError when QEMU does not let go, and what a companion raises that could not be turned back; the
        guest runs then.
        """
        async with self.lock:
            if not self.permits(Call.ABORT):
                return
            await self._end_transfer()
            was_held = self.state == HELD
            turning_back = await self._turn_back()
            if await self._is_back() or not was_held:
                changes = self._ended(ABORTED, reason)
                await self._tidy()
                if (error := await turning_back) is not None:
                    raise error
                await self.change(**changes)
            else:
                # Disks are brought back without it.
                if (error := await turning_back) is not None:
                    raise error
                await self.change(state=FAILED, message="the held copy is gone: its QEMU ended at the source")

    def adopt(self) -> None:
        """Takes up what an earlier life of this agent began."""
        if self.state in COPYING_STATES:
            self._own(self._rejoin())
        elif self.state == HELD:
            self._own(self._hold_again())

    async def _hold_again(self) -> None:
        with contextlib.suppress(HandoffError):
            if await is_running(self._monitor):
                return  # the agent died in an abort, which is repeated: what goes with the guest is its own
        with contextlib.suppress(HandoffError):  # it is logged
            await each((companion.held_again() for companion in self.companions), self.log)

    async def detach(self) -> None:
        """Ends the agent's work on it, for the agent's own end. QEMU goes on as it is."""
        for task in (self._job, self._beginning, self._pausing, self._turning_back):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await each((companion.detach() for companion in self.companions), self.log)
        await self._breaker.close()

    # What the way of transfer asks of it.

    @property
    def ordered_at(self) -> float:
        """When the switch was ordered, by the monotonic clock; 0 when it was not."""
        return self._ordered_at

    @property
    def is_paused(self) -> bool:
        """QEMU has paused the guest and waits, or goes on to the end by itself."""
        return self._paused

    async def say_ready(self, *, ready: bool) -> None:
        """READY instead of TRANSFERRING, or the other way round; any other state stays."""
        before, after = (TRANSFERRING, READY) if ready else (READY, TRANSFERRING)
        if self.state == before:
            await self.change(state=after)

    async def before_stop(self) -> bool:
        """Does what comes right before the guest is stopped. False: don't stop it, the switch is broken off."""
        if not self.companions:
            return True
        self._is_near_stop = True
        try:
            async with asyncio.timeout(BEFORE_STOP_TIMEOUT_S):
                await together(companion.pausing() for companion in self.companions)
        except HandoffError as error:
            self.break_off(error.message)
        except TimeoutError:
            self.break_off(f"what comes before the pause took more than {BEFORE_STOP_TIMEOUT_S:g} s")
        return not self._breaker.reason

    def stopping(self) -> None:
        """The guest is being paused now: its deadline counts from here."""
        self._stopping = True
        self._stopped_s = time.time()
        self._arm(self.record.switch_deadline_s)

    def not_stopped(self) -> None:
        """It was not paused after all."""
        self._stopping, self._stopped_s = False, 0.0
        self._breaker.disarm()

    def may_continue(self) -> bool:
        """The companions have done what follows the pause; a failure of theirs breaks the switch off."""
        if not self.companions:
            return True
        if self._breaker.reason:
            return False
        if self._pausing is None:
            self._pausing = asyncio.create_task(together(companion.paused() for companion in self.companions))
            self._pausing.add_done_callback(lambda _: self._wake_up())
        if not self._pausing.done() or self._pausing.cancelled():
            return False
        error = self._pausing.exception()
        if error is not None:
            self.break_off(str(error))
        return error is None

    def break_off(self, reason: str) -> None:
        """Gives the transfer up: the guest runs on."""
        if not self._breaker.reason:
            self._breaker.break_off(reason)

    def _on_break(self) -> None:
        if self._pausing is not None or self._is_near_stop:
            self._start_back()
        self._wake_up()

    def _wake_up(self) -> None:
        if self._events is not None:
            self._events.wake()

    # The transfer, from its beginning to HELD or FAILED.

    def _own(self, work: Coroutine[None, None, None]) -> None:
        self._job = asyncio.create_task(work, name=f"source-{self.record.migration_id}")

    async def _transfer(self, under_way: asyncio.Event) -> None:
        with self._slot.events(self.record.domain_uuid) as events:
            try:
                if not await self._begin_companions(under_way):
                    return
                self._breaker.stream = await self._way.begin(self.record.transfer_uri)
                self._begun = True
            except HandoffError as error:
                await self._fail(f"the transfer could not begin: {error.message}")
                return
            finally:
                under_way.set()
            await self._drive(events)

    async def _begin_companions(self, under_way: asyncio.Event) -> bool:
        """Whether the memory may follow: not after an abort."""
        if not self.companions:
            return True
        self._beginning = asyncio.create_task(together(companion.begin() for companion in self.companions))
        under_way.set()
        await asyncio.wait({self._beginning})
        if self._aborting:
            self._over = True
            return False
        self._beginning.result()
        return True

    async def _rejoin(self) -> None:
        if self.state == TRANSFERRING and await self._never_began():
            await self._transfer(asyncio.Event())
            return
        self._begun = True
        if self.record.transfer_uri.startswith(MULTIFD):
            self._breaker.stream = LocalChannels(self.record.transfer_uri.removeprefix(MULTIFD))
        with self._slot.events(self.record.domain_uuid) as events:
            if self.state == SWITCHING:
                await self._find_pause()
                await self._tell_ordered()
                self._ordered_at = time.monotonic()
            await self._drive(events)

    async def _find_pause(self) -> None:
        """A guest that was paused for the switch has its deadline from now on."""
        with contextlib.suppress(HandoffError):
            if self.record.was_running and not await is_running(self._monitor):
                self.stopping()

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

    async def _follow_user(self) -> None:
        """Whoever paused the guest, or ran it again, before the switch was ordered meant it to stay so."""
        if self._paused or self._stopping:
            return
        with contextlib.suppress(HandoffError):
            runs = await user_runs_it(self._slot, self.record.domain_uuid)
            if runs is not None and runs is not self.record.was_running:
                await self.change(was_running=runs)

    @property
    def _gone(self) -> str:
        return f"guest {self.record.domain_name} ended at the source: its QEMU is gone"

    async def _notice_end(self) -> None:
        with contextlib.suppress(HandoffError):
            if not await is_active(self._slot, self.record.domain_uuid):
                await self._fail(self._gone)

    async def _advance(self, event: Event | None) -> None:
        match event:
            case None | ConnectionEvent(connected=True):
                await self._look()
            case MonitorEvent(event="STOP" | "RESUME") if not (self._ordered_at or self._stopping or self._paused):
                await self._follow_user()
                self._stopped_s = event.time_s if event.event == "STOP" and self.record.was_running else 0.0
            case MonitorEvent(event="STOP"):
                self._stopped_s = event.time_s
                if self.record.passes_on and not self._over:
                    self._paused = True
                    self._arm(self.record.switch_deadline_s)
                if self._ordered_at:
                    self.may_continue()
            case MonitorEvent(event="RESUME"):
                self._pause_over = (self._stopped_s, event.time_s)
                self._stopped_s = 0.0
                if self._pausing is not None or self._is_near_stop:
                    await self._turn_back()
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
        if self._paused or self._stopping:
            self._next_look_s = READY_POLL_S
        else:
            self._next_look_s = await self._way.look(info)
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

    # The switch.

    async def _order(self) -> None:
        await self._tell_ordered()
        self._ordered_at = time.monotonic()
        if self._paused:
            self._arm(self.record.switch_deadline_s)
        await self._go()

    async def _tell_ordered(self) -> None:
        """The order reaches the companions before QEMU, while the guest runs."""
        if self._stopping or self._paused:
            return
        try:
            await together(companion.ordered() for companion in self.companions)
        except HandoffError as error:
            self.break_off(error.message)

    async def _go(self) -> None:
        """Does what is still missing of an ordered switch; called again until the guest is paused and sent."""
        if self._over or not self._begun or self._breaker.reason:
            return
        self._went_s = self._went_s or time.time()
        try:
            await self._way.go()
        except HandoffError as error:
            self._next_look_s = RETRY_S
            self.log.warning("switch", error=error.message)

    async def _on_pause(self) -> None:
        if not self._paused:
            if not self._ordered_at:
                await self._follow_user()
            self._paused = True
            self._stopped_s = self._stopped_s or time.time()
            self._arm(self.record.switch_deadline_s if self._ordered_at else UNORDERED_PAUSE_S)
            if not self._ordered_at:
                await self.say_ready(ready=True)
        if self._ordered_at:
            await self._go()

    async def _on_completed(self) -> None:
        if self._breaker.reason:
            # Too late: the guest is being turned back, and nobody was told that it is held.
            await self._on_broken()
            return
        if not self.may_continue():
            return
        self._over = True
        self._breaker.disarm()
        held_s = time.time()
        # QEMU may have passed the guest on before its STOP is heard; it was not paused before this.
        paused_s = self._stopped_s or self._went_s or held_s
        paused_to_held_ms = max(0.0, 1000 * (held_s - paused_s))
        try:
            await self.change(state=HELD, message="", paused_s=paused_s, paused_to_held_ms=paused_to_held_ms)
        except HandoffError as error:
            self.break_off(error.message)
            await self._on_broken()
            return
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
        if self.record.was_running and not self._breaker.reason:
            self._breaker.arm(self._stopped_s, limit_s)

    async def _fail(self, message: str) -> None:
        """FAILED means that the guest runs here: it is said once that is known."""
        self._over = True
        self._breaker.cut()
        await self._breaker.close()
        # What fails of it is logged, and done again by the abort that follows.
        await self._turn_back()
        while True:
            try:
                message = await self._with_what_became_of_it(message)
                break
            except (DeadlineError, UnavailableError) as error:
                self.log.warning("can't see whether the guest runs", error=error.message)
                await self._slot.wait_connected(ASK_AGAIN_S)
                await asyncio.sleep(RETRY_S)
        changes = self._ended(FAILED, message)
        await self._tidy()
        await self.change(**changes)

    async def _with_what_became_of_it(self, message: str) -> str:
        """Runs the guest again, and adds why that is not so. A QEMU that ends breaks its transfer first, if it can."""
        try:
            more = "" if await self._is_back() else self._gone
        except (DeadlineError, UnavailableError):
            raise
        except HandoffError as error:
            more = error.message if await is_active(self._slot, self.record.domain_uuid) else self._gone
        return f"{message}; {more}" if more and more != message else message

    # Getting back.

    async def _end_transfer(self) -> None:
        """Cancels the transfer and waits for its end. Raises DeadlineError when QEMU does not let go."""
        if self._job is None or self._job.done():
            return
        self._aborting = True
        try:
            if self._beginning is not None:
                self._beginning.cancel()
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

    async def _turn_back(self) -> asyncio.Task[HandoffError | None]:
        """Tells the companions that the guest runs here, and waits a moment for them; the task goes on if need be."""
        turning_back = self._start_back()
        await asyncio.wait({turning_back}, timeout=BACK_PATIENCE_S)
        return turning_back

    def _start_back(self) -> asyncio.Task[HandoffError | None]:
        if self._turning_back is None or self._turning_back.done():
            self._turning_back = asyncio.create_task(self._back())
        return self._turning_back

    async def _back(self) -> HandoffError | None:
        for task in (self._beginning, self._pausing):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._pausing, self._is_near_stop = None, False
        try:
            await each((companion.back() for companion in self.companions), self.log)
        except HandoffError as error:
            return error
        return None

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
