"""Two hosts in memory: honest QEMUs, and agents that follow the real agent's table of rules.

The QEMUs here know nothing of the protocol; what is forbidden is written down in `fake_guest.Guest` when it happens.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import dataclass

from fake_guest import NAME, UUID, Copy, Guest

from handoff.agent.v1 import qemu_pb2 as pb
from handoff.agent.v1.disk_pb2 import DiskMove, DiskPhase, DiskProgress, DiskStrategy
from handoff.agent.v1.host_pb2 import Host, Slot
from handoff.agent.v1.types_pb2 import Disk, DiskPlacement, Domain, DomainState, Fence
from handoff_agent.order_age import check_age
from handoff_agent.rules import (
    ABORTED,
    ACTIVE,
    DESTINATION,
    FAILED,
    FINAL_STATES,
    FINALIZED,
    HELD,
    PREPARED,
    READY,
    RELEASED,
    SOURCE,
    SWITCHING,
    TRANSFERRING,
    Answer,
    Call,
    Role,
    judge,
)
from handoff_common.errors import DeadlineError, NotFoundError, PreconditionError, UnavailableError
from handoff_controller.machine import State

CREATE_S = 0.3
LOAD_S = 0.05
REPORT_S = 0.05
RESUME_S = 0.02
SWITCH_DEADLINE_S = 2.0
TICK_S = 0.5
LIBVIRT_TIMEOUT_S = 5.0
VOLUME = Disk(placement=DiskPlacement.DISK_PLACEMENT_NETWORK, source="nbd:web", servers=["storage:10809"])


@dataclass(frozen=True)
class Bugs:
    """Seeded bugs of an agent; none in a good one."""

    ignores_terms: bool = False
    resumes_held_after_s: float | None = None
    obeys_late_orders: bool = False
    fails_when_it_does_not_know: bool = False
    """A copy that could not be run in time is called FAILED, though it may be there and run yet."""


class FakeHost:
    """One host with its agent: what `GrpcAgent` reaches over the network."""

    def __init__(self, name: str, guest: Guest, spawn: Callable[[Coroutine[object, object, None]], object]) -> None:
        self.name = name
        self.peer: FakeHost
        self.bugs = Bugs()
        self.stream_broken = False
        self.term = 0
        self.copy_s = 1.0
        self.pull_s = 0.0
        self.handoffs: dict[tuple[str, Role], pb.Handoff] = {}
        self._guest = guest
        self._spawn = spawn
        self._lock = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._told_to_switch = asyncio.Event()
        self._frozen_until = 0.0
        self._off_until = 0.0

    def turn_off(self, for_s: float) -> None:
        """Power is lost. The agent is back later, with what it has on disk."""
        self._off_until = max(self._off_until, asyncio.get_running_loop().time() + for_s)
        self.kill_qemu()

    @property
    def is_off(self) -> bool:
        return asyncio.get_running_loop().time() < self._off_until

    def freeze(self, for_s: float) -> None:
        """Its libvirtd does not answer for a while. QEMU goes on."""
        self._frozen_until = asyncio.get_running_loop().time() + for_s

    @property
    def copy(self) -> Copy:
        return self._guest.copies[self.name]

    def kill_qemu(self) -> None:
        """The QEMU process dies by itself."""
        if self.copy is Copy.GONE:
            return
        self._guest.killed.add(self.name)
        self._guest.set(self.name, Copy.GONE)
        for handoff in self.handoffs.values():
            if handoff.role == DESTINATION and handoff.state == PREPARED:
                handoff.never_ran = self.name not in self._guest.told_to_run
                self._to(handoff, FAILED, "QEMU died")
                if not handoff.never_ran:
                    self._spawn(self._pull(handoff))
            elif handoff.role == SOURCE and handoff.state in (PREPARED, TRANSFERRING, READY, SWITCHING):
                self._to(handoff, FAILED, "QEMU died")

    def get_host(self) -> Host:
        return Host(name=self.name, slots=[Slot(name="a", connected=True)], term=self.term)

    def list_domains(self) -> tuple[Domain, ...]:
        if self.copy is Copy.GONE:
            return ()
        mine = [one.migration_id for one in self.handoffs.values() if one.state not in FINAL_STATES]
        running = self.copy is Copy.RUNNING
        state = DomainState.DOMAIN_STATE_RUNNING if running else DomainState.DOMAIN_STATE_PAUSED
        migration_id = mine[0] if mine else ""
        return (Domain(uuid=UUID, name=NAME, slot="a", state=state, migration_id=migration_id, disks=[VOLUME]),)

    def list_handoffs(self) -> tuple[pb.Handoff, ...]:
        return tuple(_copied(handoff) for handoff in self.handoffs.values())

    async def watch(self, migration_id: str, role: Role) -> AsyncGenerator[pb.Handoff, None]:
        while True:
            self._must_be_on()
            handoff = self._known(migration_id, role)
            told = _copied(handoff)
            told.clock_ms = self._clock_ms()
            yield told
            if handoff.state in FINAL_STATES:
                return
            async with self._changed:
                try:
                    await asyncio.wait_for(self._changed.wait(), TICK_S)
                except TimeoutError:
                    continue

    async def validate_source(self) -> pb.SourceGuest:
        if self.copy is not Copy.RUNNING:
            raise NotFoundError(f"no {NAME} here")
        return pb.SourceGuest(domain=self.list_domains()[0])

    async def validate_destination(self, *, fast: bool) -> pb.Handoff:
        if self.copy is not Copy.GONE:
            raise PreconditionError(f"{NAME} is on {self.name} already")
        return pb.Handoff(disks=self._moves(fast=fast))

    @staticmethod
    def _moves(*, fast: bool) -> list[DiskMove]:
        return [DiskMove(target="vda", strategy=DiskStrategy.DISK_STRATEGY_PULL, base_uri="nbd:base")] if fast else []

    async def prepare_source(self, fence: Fence, migration_id: str) -> pb.SourceGuest:
        async def work(handoff: pb.Handoff) -> None:
            if self.copy is not Copy.RUNNING:
                raise NotFoundError(f"no {NAME} here")
            self._to(handoff, PREPARED)

        await self._order(fence, Call.PREPARE, migration_id, SOURCE, work)
        return pb.SourceGuest(domain=Domain(uuid=UUID, name=NAME, slot="a", disks=[VOLUME]))

    async def prepare_destination(self, fence: Fence, migration_id: str, *, fast: bool) -> pb.Handoff:
        async def work(handoff: pb.Handoff) -> None:
            if self.copy is not Copy.GONE:
                raise PreconditionError(f"{NAME} is on {self.name} already")
            await asyncio.sleep(CREATE_S)
            self._must_be_on()
            if self.name not in self._guest.admitted:
                raise PreconditionError("QEMU can't open the volume")
            if fast:
                self._guest.lacking.add(self.name)
                handoff.pulling = True
            handoff.disks.extend(self._moves(fast=fast))
            self._guest.set(self.name, Copy.LISTENING)
            handoff.listen_uri = f"tcp:{self.name}:49152"
            self._to(handoff, PREPARED)

        return await self._order(fence, Call.PREPARE, migration_id, DESTINATION, work)

    async def start_transfer(self, fence: Fence, migration_id: str, uri: str) -> pb.Handoff:
        async def work(handoff: pb.Handoff) -> None:
            if not uri:
                self._guest.violations.append("the transfer was started to nowhere")
            self._told_to_switch = asyncio.Event()
            self.stream_broken = False
            self._to(handoff, TRANSFERRING)
            self._spawn(self._transfer(handoff))

        return await self._order(fence, Call.START_TRANSFER, migration_id, SOURCE, work)

    async def switch_over(self, fence: Fence, migration_id: str) -> pb.Handoff:
        async def work(handoff: pb.Handoff) -> None:
            self._guest.expect_record("told to switch", State.SWITCHING, State.ABORTING, State.ABORTED)
            self._told_to_switch.set()

        return await self._order(fence, Call.SWITCH_OVER, migration_id, SOURCE, work)

    def _clock_ms(self) -> int:
        return int(1000 * asyncio.get_running_loop().time())

    async def activate(self, fence: Fence, migration_id: str, heard_clock_ms: int) -> pb.Handoff:
        if not self.bugs.obeys_late_orders:
            check_age(heard_clock_ms, self._clock_ms())

        async def work(handoff: pb.Handoff) -> None:
            self._guest.expect_record(
                f"{self.name} told to run", State.COMMITTED, State.FINISHING, State.DONE, State.ABORTING
            )
            self._guest.told_to_run.add(self.name)
            await asyncio.sleep(RESUME_S)
            if self.copy is Copy.PAUSED:
                self._guest.expect_record(f"{self.name} runs", State.COMMITTED)
                self._guest.set(self.name, Copy.RUNNING)
                self._to(handoff, ACTIVE)
                self._spawn(self._pull(handoff))
            elif self.copy is Copy.LISTENING:
                self._guest.violations.append("told to run a copy that has no state")

        return await self._order(fence, Call.ACTIVATE, migration_id, DESTINATION, work)

    async def release_source(self, fence: Fence, migration_id: str, *, keep_disks: bool) -> pb.Handoff:
        async def work(handoff: pb.Handoff) -> None:
            self._guest.expect_record("the held copy is destroyed", State.FINISHING, State.DONE)
            self._guest.expect_arrived("the held copy is destroyed")
            self._guest.set(self.name, Copy.GONE)
            if not keep_disks:
                self._guest.remove_images(self.name)
            self._to(handoff, RELEASED)

        return await self._order(fence, Call.RELEASE, migration_id, SOURCE, work)

    async def finalize_destination(self, fence: Fence, migration_id: str) -> pb.Handoff:
        async def work(handoff: pb.Handoff) -> None:
            self._guest.expect_arrived("the pull is ended")
            handoff.ended = self.copy is Copy.GONE
            self._to(handoff, FINALIZED)

        return await self._order(fence, Call.FINALIZE, migration_id, DESTINATION, work)

    async def abort(
        self, fence: Fence, migration_id: str, role: Role, reason: str, *, fenced: bool = False
    ) -> pb.Handoff:
        async def work(handoff: pb.Handoff) -> None:
            if role == SOURCE:
                if self.copy is Copy.PAUSED:
                    self._guest.expect_record("the held source resumed", State.ABORTING, State.ABORTED)
                    self._guest.set(self.name, Copy.RUNNING)
            else:
                handoff.never_ran = self.copy is not Copy.RUNNING
                self._guest.set(self.name, Copy.GONE)
                self._guest.remove_images(self.name)
            self._to(handoff, ABORTED, reason)

        is_evicted = fenced and role == DESTINATION
        return await self._order(fence, Call.EVICT if is_evicted else Call.ABORT, migration_id, role, work)

    async def _order(
        self, fence: Fence, call: Call, migration_id: str, role: Role, work: Callable[[pb.Handoff], Awaitable[None]]
    ) -> pb.Handoff:
        self._must_be_on()
        if fence.term < self.term and not self.bugs.ignores_terms:
            raise PreconditionError(f"term {fence.term} is over: this agent has obeyed term {self.term}")
        self.term = max(self.term, fence.term)
        async with self._lock:
            self._must_be_on()
            known = self.handoffs.get((migration_id, role))
            verdict = judge(call, role, known.state if known else None)
            if verdict.answer is Answer.REFUSE:
                raise PreconditionError(verdict.message)
            handoff = known or pb.Handoff(
                migration_id=migration_id, role=role, domain_uuid=UUID, domain_name=NAME, was_running=True
            )
            if verdict.answer is Answer.PROCEED:
                if asyncio.get_running_loop().time() < self._frozen_until:
                    await self._time_out(call, handoff)
                else:
                    await work(handoff)
            return _copied(handoff)

    async def _time_out(self, call: Call, handoff: pb.Handoff) -> None:
        if call is Call.ACTIVATE:
            self._guest.told_to_run.add(self.name)
        await asyncio.sleep(LIBVIRT_TIMEOUT_S)
        if call is Call.ACTIVATE and self.bugs.fails_when_it_does_not_know and handoff.state == PREPARED:
            self._to(handoff, FAILED, "libvirt does not answer")
        else:
            raise DeadlineError("libvirt does not answer")

    def _must_be_on(self) -> None:
        if self.is_off:
            raise UnavailableError(f"{self.name} is off")

    async def _pull(self, handoff: pb.Handoff) -> None:
        """What the destination still lacks; QEMU need not be there for that."""
        left_s = self.pull_s
        while handoff.pulling and handoff.state not in FINAL_STATES:
            await asyncio.sleep(TICK_S)
            source = self.peer.handoffs.get((handoff.migration_id, SOURCE))
            starves = self.peer.is_off or source is None or source.state != HELD
            reading = DiskProgress(target="vda", phase=DiskPhase.DISK_PHASE_PULLING)
            reading.decision = "nothing comes" if starves else ""
            del handoff.progress.disks[:]
            handoff.progress.disks.append(reading)
            if self.is_off or starves or handoff.state in FINAL_STATES:
                continue
            left_s -= TICK_S
            if left_s <= 0:
                self._guest.is_whole_at(self.name)
                handoff.pulling = False
                self._spawn(self._notify())

    async def _transfer(self, handoff: pb.Handoff) -> None:
        """QEMU's migration, from its start until the guest is held or runs on."""
        await asyncio.sleep(self.copy_s)
        if not self._goes_on(handoff, TRANSFERRING):
            return
        self._to(handoff, READY)
        while not self._told_to_switch.is_set():
            await asyncio.sleep(REPORT_S)
            if not self._goes_on(handoff, READY):
                return
        self._to(handoff, SWITCHING)
        self._guest.set(self.name, Copy.PAUSED)
        handoff.switch_timings.paused_time.GetCurrentTime()
        await asyncio.sleep(LOAD_S)
        if self._goes_on(handoff, SWITCHING, hangs=True):
            self._guest.set(self.peer.name, Copy.PAUSED)
            await asyncio.sleep(REPORT_S)
            if self._goes_on(handoff, SWITCHING, hangs=True):
                self._to(handoff, HELD)
                if self.bugs.resumes_held_after_s is not None:
                    await self._resume_by_itself(handoff, self.bugs.resumes_held_after_s)
                return
        # The source has not heard that all has arrived: it waits for its deadline and runs the guest again.
        await asyncio.sleep(SWITCH_DEADLINE_S)
        if handoff.state == SWITCHING and self.copy is Copy.PAUSED:
            self._guest.set(self.name, Copy.RUNNING)
            self._to(handoff, FAILED, "the stream broke in the switch")

    def _goes_on(self, handoff: pb.Handoff, state: "pb.HandoffState.ValueType", *, hangs: bool = False) -> bool:
        if handoff.state != state:
            return False
        if self.stream_broken or self.peer.copy not in (Copy.LISTENING, Copy.PAUSED):
            if not hangs:
                self._to(handoff, FAILED, "the stream broke")
            return False
        return True

    async def _resume_by_itself(self, handoff: pb.Handoff, after_s: float) -> None:
        await asyncio.sleep(after_s)
        if handoff.state == HELD and self.copy is Copy.PAUSED:
            self._guest.set(self.name, Copy.RUNNING)
            self._to(handoff, FAILED, "held for too long")

    def _known(self, migration_id: str, role: Role) -> pb.Handoff:
        handoff = self.handoffs.get((migration_id, role))
        if handoff is None:
            raise NotFoundError(f"{self.name} has not heard of {migration_id}")
        return handoff

    def _to(self, handoff: pb.Handoff, state: "pb.HandoffState.ValueType", message: str = "") -> None:
        handoff.state = state
        handoff.message = message or handoff.message
        self.handoffs[handoff.migration_id, handoff.role] = handoff
        self._spawn(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _copied(handoff: pb.Handoff) -> pb.Handoff:
    copied = pb.Handoff()
    copied.CopyFrom(handoff)
    return copied
