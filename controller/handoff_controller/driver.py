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
from functools import partial
from typing import Protocol, TypeVar

import structlog

from handoff.agent.v1.disk_pb2 import DiskMove
from handoff.agent.v1.qemu_pb2 import Handoff, HandoffRole, HandoffState, TransferLimits, TransferProgress
from handoff.agent.v1.types_pb2 import Fence
from handoff.controller.v1.migrations_pb2 import Migration, MigrationKind
from handoff.storage.v1.access_pb2 import Volume
from handoff_common.errors import DeadlineError, HandoffError, PreconditionError, UnavailableError
from handoff_controller.agents import Agent
from handoff_controller.machine import CANCELLABLE, FINAL, PHASES, Event, State, Step, enter, next_state, state_of
from handoff_controller.volumes import Volumes, check_unchanged, label, network_volumes

log = structlog.get_logger()
Answer = TypeVar("Answer")

# How long an agent may be out of reach, in seconds, before its step counts as failed. A restarted agent is back within
# a few seconds. While the guest may be paused (SWITCHING) we give up sooner: the abort is what brings it back.
PATIENCE_S = {State.PREPARING: 15.0, State.COPYING: 30.0, State.SWITCHING: 5.0, State.FINISHING: 30.0}
ABORT_DESTINATION_PATIENCE_S = 30.0
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0
PROGRESS_INTERVAL_S = 1.0

TRANSIENT = (UnavailableError, DeadlineError)
SOURCE = HandoffRole.HANDOFF_ROLE_SOURCE
DESTINATION = HandoffRole.HANDOFF_ROLE_DESTINATION
RAN_HERE = frozenset({HandoffState.HANDOFF_STATE_ACTIVE, HandoffState.HANDOFF_STATE_FINALIZED})


class Records(Protocol):
    """Where migrations are kept; see store.py."""

    async def save(self, migration: Migration) -> Migration:
        """Writes a changed record, with what its state means for the guest's owner, in one transaction."""

    async def put_progress(self, migration_id: str, progress: TransferProgress) -> None:
        """Publishes a reading of the copy; it may be lost."""


class StepFailed(Exception):  # noqa: N818 - an outcome, not an error of the program
    """A step can't succeed any more. The message is what the record will say."""


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
    ) -> None:
        """`admitted` is set once the migration may begin."""
        self._volumes = volumes
        self.migration = migration
        self._records = records
        self._source = source
        self._destination = destination
        self._fence = fence
        self._admitted = admitted
        self._cancelled = asyncio.Event()
        if migration.cancel_requested:
            self._cancelled.set()
        self._lock = asyncio.Lock()
        self._held_at: float | None = None
        self._committed_at: float | None = None
        self._log = log.bind(migration=migration.id, guest=migration.guest_name, term=fence.term)

    async def run(self) -> Migration:
        """Goes on until the state is final. Raises what `Records.save` raises: then another leader goes on."""
        while (state := state_of(self.migration)) not in FINAL:
            await self._advance(await self._perform(state))
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
        if state is State.COMMITTED:
            self._committed_at = asyncio.get_running_loop().time()
            if self._held_at is not None:
                self.migration.outcome.held_to_committed_ms = 1000 * (self._committed_at - self._held_at)
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
            Step.SWITCH_OVER: self._switch_over,
            Step.AWAIT_HELD: self._await_held,
            Step.ACTIVATE: self._activate,
            Step.RELEASE_SOURCE: self._release_source,
            Step.FINALIZE_DESTINATION: self._finalize_destination,
            Step.ABORT_SOURCE: self._abort_source,
            Step.ABORT_DESTINATION: self._abort_destination,
            Step.REVOKE_VOLUMES: self._revoke_volumes,
        }
        try:
            if phase.concurrent:
                await _together([actions[step] for step in phase.steps])
            for step in (() if phase.concurrent else phase.steps) + phase.then:
                event = await actions[step]()
                if event is not None:
                    return Work(event, self.migration.error)
            return Work(Event.COMPLETED)
        except StepFailed as failure:
            return Work(Event.FAILED, str(failure))

    async def _insist(
        self, call: Callable[[], Awaitable[Answer]], patience_s: float, *, also_refusals: bool = False
    ) -> Answer:
        """Repeats an idempotent call while its agent can't be reached, for `patience_s` seconds.

        Raises StepFailed with the last error. `also_refusals`: a refusal is repeated too, where going back is no
        choice.
        """
        loop = asyncio.get_running_loop()
        gives_up = loop.time() + patience_s
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return await call()
            except HandoffError as error:
                if not isinstance(error, TRANSIENT) and not also_refusals:
                    raise StepFailed(error.message) from error
                if loop.time() + pause_s > gives_up:
                    raise StepFailed(error.message) from error
                self._log.warning("agent call failed; trying again", error=error.message)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _await_admission(self) -> None:
        await self._admitted.wait()

    async def _prepare_source(self) -> None:
        self._guest = await self._insist(
            lambda: self._source.prepare_source(
                self._fence,
                self.migration.id,
                self.migration.guest_uuid,
                local=self.migration.kind == MigrationKind.MIGRATION_KIND_UPGRADE,
            ),
            PATIENCE_S[State.PREPARING],
        )

    async def _grant_volumes(self) -> None:
        """Lets the destination open the guest's network volumes."""
        planned = self.migration.volumes
        try:
            check_unchanged(self.migration.guest_name, planned, self._volumes_now())
        except PreconditionError as error:
            raise StepFailed(error.message) from error
        host = self.migration.destination.host
        for volume in planned:
            await self._insist(partial(self._volumes.grant, volume, host), PATIENCE_S[State.PREPARING])

    def _volumes_now(self) -> list[Volume]:
        # A guest that stays on its host needs no other access than it has.
        upgrade = self.migration.kind == MigrationKind.MIGRATION_KIND_UPGRADE
        return [] if upgrade else network_volumes(self._guest.domain.disks)

    async def _revoke_volumes(self) -> None:
        """Shuts the host out that does not have the guest in the end, also where its agent does not answer."""
        gone = state_of(self.migration) is State.FINISHING
        host = self.migration.source.host if gone else self.migration.destination.host
        for volume in self.migration.volumes:
            call = partial(self._volumes.revoke, volume, host)
            try:
                await self._insist(call, PATIENCE_S[State.FINISHING], also_refusals=True)
            except StepFailed as failure:
                self._warn(f"{failure}. Take {label(volume)} from {host} by hand")

    async def _prepare_destination(self) -> None:
        handoff = await self._insist(self._listening, PATIENCE_S[State.PREPARING])
        if handoff.state == HandoffState.HANDOFF_STATE_FAILED:
            raise StepFailed(f"{self.migration.destination.host}: {handoff.message}")
        self.migration.listen_uri = handoff.listen_uri
        set_disks(self.migration, handoff.disks)

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
                self._fence, self.migration.id, self.migration.listen_uri, limits, self.migration.disks
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

    async def _switch_over(self) -> None:
        await self._insist(
            lambda: self._source.switch_over(self._fence, self.migration.id), PATIENCE_S[State.SWITCHING]
        )

    async def _await_held(self) -> None:
        handoff = await self._watch_source(frozenset({HandoffState.HANDOFF_STATE_HELD}), PATIENCE_S[State.SWITCHING])
        # Another leader, or a watch that was lost, may have missed the moment itself.
        self._held_at = asyncio.get_running_loop().time() - handoff.switch_timings.held_for_ms / 1000
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

    async def _activate(self) -> Event | None:
        """Runs the guest at the destination, however long it takes; or learns that it never can have run there."""
        handoff = await self._persist("activate", self._activated)
        if handoff.state in RAN_HERE:
            self._note_running(handoff)
            return None
        if not handoff.never_ran:
            # It may have run, and written to its disks: the held copy is of the past.
            self.migration.error = (
                f"{self.migration.guest_name} was moved to {self.migration.destination.host} and does not run there: "
                f"{handoff.message}. Start it there"
            )
            return None
        why = handoff.message or "the destination's copy is gone"
        undone = await self._persist(
            "fence",
            lambda: self._destination.abort(self._fence, self.migration.id, DESTINATION, f"never ran: {why}"),
        )
        if undone.state in RAN_HERE:
            self._note_running(undone)
            return None
        self.migration.error = f"{self.migration.destination.host} could not run the guest: {why}"
        return Event.FENCED

    async def _activated(self) -> Handoff:
        """Activate. A copy that was aborted refuses it: its state is the answer, and may be the proof."""
        try:
            return await self._destination.activate(self._fence, self.migration.id)
        except PreconditionError:
            # A leader that ended between the proof and its record has aborted it.
            async with aclosing(self._destination.watch(self.migration.id, DESTINATION)) as states:
                handoff = await anext(states)
            if handoff.state != HandoffState.HANDOFF_STATE_ABORTED:
                raise
            return handoff

    async def _persist(self, what: str, call: Callable[[], Awaitable[Handoff]]) -> Handoff:
        """Repeats a call for ever: the guest is committed to its host. The operator sees why in the record."""
        while True:
            try:
                return await self._insist(call, 10.0, also_refusals=True)
            except StepFailed as failure:
                self._log.error("the destination owns the guest but does not answer", call=what, error=str(failure))
                async with self._lock:
                    self._warn(f"{what}: {failure}")
                    self.migration = await self._records.save(self.migration)

    def _note_running(self, handoff: Handoff) -> None:
        outcome = self.migration.outcome
        if self._committed_at is not None and self._held_at is not None:
            passed_ms = 1000 * (asyncio.get_running_loop().time() - self._committed_at)
            outcome.committed_to_running_ms = max(0.0, passed_ms - handoff.activate_timings.running_for_ms)
            outcome.downtime_ms = (
                outcome.paused_to_held_ms + outcome.held_to_committed_ms + outcome.committed_to_running_ms
            )
        else:
            self._warn("the leader changed during the pause: downtime_ms is from the clocks of two hosts")
            if outcome.HasField("paused_time"):
                running_ns = handoff.activate_timings.running_time.ToNanoseconds()
                outcome.downtime_ms = max(0.0, (running_ns - outcome.paused_time.ToNanoseconds()) / 1e6)

    async def _release_source(self) -> None:
        released = await self._try(
            "release",
            self.migration.source.host,
            lambda: self._source.release_source(
                self._fence, self.migration.id, keep_disks=self.migration.options.keep_source_disks
            ),
        )
        if released is not None:
            # QEMU's final figures come after "held", when nobody waits for them.
            outcome = self.migration.outcome
            outcome.qemu_downtime_ms = released.switch_timings.qemu_downtime_ms or outcome.qemu_downtime_ms
            outcome.ram_bytes = max(outcome.ram_bytes, released.progress.ram_transferred_bytes)
            outcome.iterations = max(outcome.iterations, released.progress.iterations)

    async def _finalize_destination(self) -> None:
        await self._try(
            "finalize",
            self.migration.destination.host,
            lambda: self._destination.finalize_destination(self._fence, self.migration.id),
        )

    async def _try(self, what: str, host: str, call: Callable[[], Awaitable[Handoff]]) -> Handoff | None:
        try:
            return await self._insist(call, PATIENCE_S[State.FINISHING], also_refusals=True)
        except StepFailed as failure:
            self._warn(f"{what} on {host} has not been done: {failure}. It is done when the host's agent is back")
            return None

    async def _abort_source(self) -> None:
        """Lets the guest run at the source again. There is no giving up: it may be held there."""
        while True:
            try:
                handoff = await self._insist(
                    lambda: self._source.abort(self._fence, self.migration.id, SOURCE, self.migration.error),
                    10.0,
                    also_refusals=True,
                )
            except StepFailed as failure:
                self._log.error("the source does not confirm the abort", error=str(failure))
                async with self._lock:
                    self._warn(f"{self.migration.source.host} does not confirm the abort, which goes on: {failure}")
                    self.migration = await self._records.save(self.migration)
                continue
            outcome = self.migration.outcome
            outcome.downtime_ms = handoff.switch_timings.paused_to_resumed_ms
            if handoff.message and handoff.message not in self.migration.error:
                self._warn(f"{self.migration.source.host}: {handoff.message}")
            return

    async def _abort_destination(self) -> None:
        try:
            await self._insist(
                lambda: self._destination.abort(self._fence, self.migration.id, DESTINATION, self.migration.error),
                ABORT_DESTINATION_PATIENCE_S,
                also_refusals=True,
            )
        except StepFailed as failure:
            self._warn(
                f"the copy on {self.migration.destination.host} has not been removed: {failure}. "
                "It never ran, and is removed when the host's agent is back"
            )

    def _warn(self, warning: str) -> None:
        if warning not in self.migration.warnings:
            self.migration.warnings.append(warning)


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


async def _coroutine(action: Callable[[], Awaitable[Event | None]]) -> None:
    await action()


async def _together(actions: Sequence[Callable[[], Awaitable[Event | None]]]) -> None:
    """Runs all at once. Raises the first failure as it is, not a group of them, after the others were cancelled."""
    tasks = [asyncio.create_task(_coroutine(action)) for action in actions]
    try:
        await asyncio.gather(*tasks)
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
