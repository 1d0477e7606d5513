"""Drives one migration from the state it is in to a final one.

One task a migration, on the leader only. Each state's steps are calls to the two agents; each change of state is one
guarded write to etcd. A cancel, a deadline or a step that failed for good leads to the abort, before the commit;
after it there is only forward, and what goes wrong becomes a warning.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime

from handoff.agent.v1.disk_pb2 import DiskMove
from handoff.agent.v1.qemu_pb2 import Handoff, HandoffState, TransferLimits
from handoff.agent.v1.types_pb2 import Fence
from handoff.controller.v1.migrations_pb2 import Migration, MigrationKind
from handoff_common.errors import HandoffError, PreconditionError, UnavailableError
from handoff_controller.agents import Agent
from handoff_controller.decisions import Decision, Decisions, check_decidable, check_fence, is_taken
from handoff_controller.fencing import Fencing
from handoff_controller.forward import Forward, Peers
from handoff_controller.journey import FIRST_PAUSE_S, SOURCE, TRANSIENT, Journey, Records, StepFailed
from handoff_controller.machine import CANCELLABLE, FINAL, PHASES, Event, State, Step, enter, next_state, state_of
from handoff_controller.undo import Undo
from handoff_controller.volume_steps import VolumeSteps
from handoff_controller.volumes import Volumes

# How long an agent may be out of reach, in seconds, before its step counts as failed. A restarted agent is back within
# a few seconds. While the guest may be paused (SWITCHING) we give up sooner: the abort is what brings it back.
PATIENCE_S = {State.PREPARING: 15.0, State.COPYING: 30.0, State.SWITCHING: 5.0}
PROGRESS_INTERVAL_S = 1.0

# The guest waits meanwhile; who has to know is told in FINISHING.
IN_THE_PAUSE = frozenset({State.SWITCHING, State.COMMITTED})


@dataclass(frozen=True, slots=True)
class Work:
    """How the work of a state ended."""

    event: Event
    reason: str = ""


class Driver:
    """One migration on its way. `run` it as a task; `cancel` may be called at any time."""

    def __init__(
        self,
        migration: Migration,
        records: Records,
        source: Agent,
        destination: Agent,
        fence: Fence,
        admitted: asyncio.Event,
        volumes: Volumes,
        fencing: Fencing,
        peers: Peers | None = None,
    ) -> None:
        """`admitted` is set once the migration may begin. Without `peers`, nobody is told where the guest is."""
        self._way = Journey(migration, records, source, destination, fence)
        self._decisions = Decisions()
        self._forward = Forward(self._way, self._decisions, fencing, peers)
        self._volumes = VolumeSteps(self._way, volumes)
        self._undo = Undo(self._way, self._decisions, fencing)
        self._records = records
        self._source = source
        self._destination = destination
        self._fence = fence
        self._admitted = admitted
        self._peers = peers
        self._cancelled = asyncio.Event()
        if migration.cancel_requested:
            self._cancelled.set()
        self._lock = self._way.lock
        self._log = self._way.log
        self._insist = self._way.insist

    @property
    def migration(self) -> Migration:
        """The record as it is now."""
        return self._way.migration

    @migration.setter
    def migration(self, changed: Migration) -> None:
        self._way.migration = changed

    async def run(self) -> Migration:
        """Goes on until the state is final. Raises what `Records.save` raises: then another leader goes on."""
        try:
            while (state := state_of(self.migration)) not in FINAL:
                await self._advance(await self._perform(state))
        finally:
            self._decisions.close()
        return self.migration

    async def cancel(self) -> Migration:
        """Records the wish and lets the abort begin. Raises PreconditionError when it comes too late."""
        async with self._lock:
            state = state_of(self.migration)
            if state in (State.ABORTING, State.ABORTED):
                return self.migration
            if state not in CANCELLABLE:
                raise PreconditionError(f"migration {self.migration.id} is {state.name}: {_committed(self.migration)}")
            changed = Migration()
            changed.CopyFrom(self.migration)
            changed.cancel_requested = True
            try:
                self.migration = await self._records.save(changed)
            finally:
                # An unanswered write may be there: the abort's own write then finds out.
                self._cancelled.set()
        return self.migration

    async def recover(self, decision: Decision) -> Migration:
        """Carries out an operator's decision.

        Raises PreconditionError when it is unsafe, or needless, InvalidArgumentError when it contradicts itself.
        """
        check_fence(self.migration, decision)
        if not is_taken(self.migration, decision):
            check_decidable(self.migration, decision)
            await self._decisions.ask(decision)
        return self.migration

    async def wait_for(self, reason: str) -> None:
        """Notes in the record what a planned migration waits for."""
        async with self._lock:
            if state_of(self.migration) is State.PLANNED and self.migration.waiting_for != reason:
                changed = Migration()
                changed.CopyFrom(self.migration)
                changed.waiting_for = reason
                self.migration = await self._records.save(changed)

    async def _advance(self, work: Work) -> None:
        async with self._lock:
            before = state_of(self.migration)
            # A cancel that was granted while the last step ended must not be followed by the next state.
            if self.migration.cancel_requested and before in CANCELLABLE and work.event is Event.COMPLETED:
                work = _cancelled(before)
            state = next_state(before, work.event)
            changed = enter(self.migration, state, at=datetime.now(UTC), term=self._fence.term, reason=work.reason)
            self.migration = await self._records.save(changed)
        self._decisions.recorded()
        if state is State.COMMITTED:
            self._way.committed_at = asyncio.get_running_loop().time()
            if self._way.held_at is not None:
                passed_s = self._way.committed_at - self._way.held_at
                self.migration.outcome.held_to_committed_ms = 1000 * passed_s
        if self._peers is not None and state not in IN_THE_PAUSE:
            self._peers.look_again()
        self._log.info("state", state=state.name, reason=work.reason)

    async def _perform(self, state: State) -> Work:
        """Runs the steps of a state; those of a cancellable one end early by a cancel or the migration's deadline."""
        work = asyncio.create_task(self._steps(state), name=f"{self.migration.id} {state.name}")
        if state not in CANCELLABLE:
            return await _owned(work)
        cancelled = asyncio.create_task(self._cancelled.wait())
        try:
            await asyncio.wait({work, cancelled}, timeout=self._time_left_s(), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if cancelled.done():
                return _cancelled(state)
            return Work(Event.FAILED, self._too_late(state))
        finally:
            for task in (work, cancelled):
                task.cancel()
            await asyncio.wait({work, cancelled})

    def _time_left_s(self) -> float | None:
        """Seconds until the migration's own deadline; it counts from its admission."""
        for change in self.migration.timeline:
            if change.state == State.PREPARING.value:
                began = change.time.ToMilliseconds() / 1000
                ends = began + self.migration.options.timeout.ToTimedelta().total_seconds()
                return max(0.0, ends - datetime.now(UTC).timestamp())
        return None

    def _too_late(self, state: State) -> str:
        progress = self.migration.progress
        detail = (
            f"; {progress.ram_remaining_bytes >> 20} MiB were left at {progress.throughput_bytes_per_s >> 20} MiB/s: "
            f"{progress.decision}"
            if progress.elapsed_ms
            else ""
        )
        timeout_s = self.migration.options.timeout.ToTimedelta().total_seconds()
        return f"not finished within {timeout_s:g} s, still {state.name}{detail}; allow more time or a longer downtime"

    async def _steps(self, state: State) -> Work:
        phase = PHASES[state]
        actions: dict[Step, Callable[[], Awaitable[Event | None]]] = {
            Step.AWAIT_ADMISSION: self._await_admission,
            Step.PREPARE_SOURCE: self._prepare_source,
            Step.GRANT_VOLUMES: self._grant_volumes,
            Step.PREPARE_DESTINATION: self._prepare_destination,
            Step.START_TRANSFER: self._start_transfer,
            Step.AWAIT_READY: self._await_ready,
            Step.CONFIRM_DESTINATION: self._confirm_destination,
            Step.SWITCH_OVER: self._switch_over,
            Step.AWAIT_HELD: self._await_held,
            Step.ACTIVATE: self._forward.activate,
            Step.POINT_PEERS: self._forward.point_peers,
            Step.AWAIT_DISKS: self._forward.disks.arrive,
            Step.RELEASE_SOURCE: self._forward.release_source,
            Step.FINALIZE_DESTINATION: self._forward.finalize_destination,
            Step.ABORT_SOURCE: self._undo.abort_source,
            Step.ABORT_DESTINATION: self._undo.abort_destination,
            Step.REVOKE_VOLUMES: self._volumes.revoke,
        }
        try:
            if phase.concurrent:
                event = await _together([actions[step] for step in phase.steps])
                if event is not None:
                    return Work(event, self.migration.error)
            for step in (() if phase.concurrent else phase.steps) + phase.then:
                event = await actions[step]()
                if event is not None:
                    return Work(event, self.migration.error)
            return Work(Event.COMPLETED)
        except StepFailed as failure:
            return Work(Event.FAILED, str(failure))

    async def _await_admission(self) -> None:
        await self._admitted.wait()

    async def _prepare_source(self) -> None:
        self._guest = await self._insist(
            lambda: self._source.prepare_source(
                self._fence,
                self.migration.id,
                self.migration.guest_uuid,
                local=self.migration.kind == MigrationKind.MIGRATION_KIND_UPGRADE,
                disks=self.migration.disks,
            ),
            PATIENCE_S[State.PREPARING],
        )

    async def _grant_volumes(self) -> None:
        await self._volumes.grant(self._guest.domain.disks)

    async def _prepare_destination(self) -> None:
        handoff = await self._insist(self._listening, PATIENCE_S[State.PREPARING])
        if handoff.state == HandoffState.HANDOFF_STATE_FAILED:
            raise StepFailed(f"{self.migration.destination.host}: {handoff.message}")
        self.migration.listen_uri = handoff.listen_uri
        set_disks(self.migration, handoff.disks)
        self.migration.destination_tunnel_address = handoff.tunnel_address

    async def _listening(self) -> Handoff:
        """PrepareDestination. An agent that was restarted in the middle of it has first to undo what it began."""
        handoff = await self._destination.prepare_destination(
            self._fence,
            self.migration.id,
            self._guest,
            self.migration.destination.slot,
            method=self.migration.method,
            emulator=self.migration.release,
            fast=self.migration.options.fast,
            bandwidth_bytes_per_s=self.migration.options.bandwidth_bytes_per_s,
        )
        if handoff.state == HandoffState.HANDOFF_STATE_PREPARED and not handoff.listen_uri:
            raise UnavailableError(f"{self.migration.destination.host}: the incoming domain is not ready yet")
        return handoff

    async def _start_transfer(self) -> None:
        options = self.migration.options
        limits = TransferLimits(
            bandwidth_bytes_per_s=options.bandwidth_bytes_per_s,
            downtime_limit_ms=options.downtime_limit_ms,
            switch_deadline=options.switch_deadline,
        )
        await self._insist(
            lambda: self._source.start_transfer(
                self._fence,
                self.migration.id,
                self.migration.listen_uri,
                limits,
                self.migration.disks,
                self.migration.destination_tunnel_address,
            ),
            PATIENCE_S[State.COPYING],
        )

    async def _await_ready(self) -> None:
        await self._watch_source(
            frozenset(
                {
                    HandoffState.HANDOFF_STATE_READY,
                    HandoffState.HANDOFF_STATE_SWITCHING,
                    HandoffState.HANDOFF_STATE_HELD,
                }
            ),
            PATIENCE_S[State.COPYING],
            publish=True,
        )

    async def _confirm_destination(self) -> None:
        """Hears from the destination once more: after the commit only it can run the guest."""
        handoff = await self._insist(self._way.see_destination, PATIENCE_S[State.SWITCHING])
        if handoff.state != HandoffState.HANDOFF_STATE_PREPARED:
            reason = handoff.message or f"its copy is {HandoffState.Name(handoff.state)}"
            raise StepFailed(f"{self.migration.destination.host}: {reason}")

    async def _switch_over(self) -> None:
        await self._insist(
            lambda: self._source.switch_over(self._fence, self.migration.id), PATIENCE_S[State.SWITCHING]
        )

    async def _await_held(self) -> None:
        handoff = await self._watch_source(frozenset({HandoffState.HANDOFF_STATE_HELD}), PATIENCE_S[State.SWITCHING])
        # Another leader, or a watch that was lost, may have missed the moment itself.
        self._way.held_at = asyncio.get_running_loop().time() - handoff.switch_timings.held_for_ms / 1000
        self.migration.stays_paused = not handoff.was_running
        outcome = self.migration.outcome
        outcome.paused_time.CopyFrom(handoff.switch_timings.paused_time)
        outcome.paused_to_held_ms = handoff.switch_timings.paused_to_held_ms
        outcome.qemu_downtime_ms = handoff.switch_timings.qemu_downtime_ms
        outcome.ram_bytes = handoff.progress.ram_transferred_bytes
        outcome.iterations = handoff.progress.iterations

    async def _watch_source(self, awaited: frozenset[int], patience_s: float, *, publish: bool = False) -> Handoff:
        """Follows the source's side until it is in one of the awaited states. Raises StepFailed when it failed.

        `publish`: writes the progress to etcd, which costs time that the switch does not have.
        """
        loop = asyncio.get_running_loop()
        published_at = 0.0
        last_word = loop.time()
        while True:
            try:
                async with aclosing(self._source.watch(self.migration.id, SOURCE)) as states:
                    async for handoff in states:
                        last_word = loop.time()
                        self.migration.progress.CopyFrom(handoff.progress)
                        if handoff.state in awaited:
                            return handoff
                        if handoff.state in (
                            HandoffState.HANDOFF_STATE_FAILED,
                            HandoffState.HANDOFF_STATE_ABORTED,
                            HandoffState.HANDOFF_STATE_RELEASED,
                        ):
                            raise StepFailed(handoff.message or "the source gave the transfer up")
                        if publish and loop.time() - published_at > PROGRESS_INTERVAL_S:
                            published_at = loop.time()
                            await self._records.put_progress(self.migration.id, handoff.progress)
            except TRANSIENT as error:
                if loop.time() - last_word > patience_s:
                    raise StepFailed(error.message) from error
                self._log.warning("source agent lost; watching again", error=error.message)
            except HandoffError as error:
                raise StepFailed(error.message) from error
            await asyncio.sleep(FIRST_PAUSE_S)


def set_disks(migration: Migration, disks: Iterable[DiskMove]) -> None:
    """Puts the plan for the disks into a record."""
    del migration.disks[:]
    migration.disks.extend(disks)


def _committed(migration: Migration) -> str:
    """Why a cancel is refused, and what to do instead."""
    if migration.kind == MigrationKind.MIGRATION_KIND_UPGRADE:
        return f"{migration.guest_name} already has its new QEMU. To bring the old one back, upgrade it to that release"
    return (
        f"{migration.guest_name} already belongs to {migration.destination.host}. To bring it back, migrate it to "
        f"{migration.source.host}"
    )


def _cancelled(state: State) -> Work:
    return Work(Event.FAILED, f"cancelled by the operator while {state.name}")


async def _coroutine(action: Callable[[], Awaitable[Event | None]]) -> Event | None:
    return await action()


async def _together(actions: Sequence[Callable[[], Awaitable[Event | None]]]) -> Event | None:
    """Runs all at once, until all have ended or one of them says what follows; the others are cancelled then.

    Raises the first failure as it is, not a group of them, after the others were cancelled.
    """
    tasks = [asyncio.create_task(_coroutine(action)) for action in actions]
    try:
        for ended in asyncio.as_completed(tasks):
            if (event := await ended) is not None:
                return event
        return None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _owned(task: asyncio.Task[Work]) -> Work:
    """Awaits a task that goes when its owner goes."""
    try:
        return await task
    finally:
        task.cancel()
