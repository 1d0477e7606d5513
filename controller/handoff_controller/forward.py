"""After the commit: the guest is run at its destination, however long it takes, and the source cleaned up."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from handoff.agent.v1.qemu_pb2 import Handoff, HandoffState
from handoff_common.errors import PreconditionError
from handoff_controller.journey import DESTINATION, RAN_HERE, Journey, StepFailed
from handoff_controller.machine import Event

PATIENCE_S = 30.0


class Forward:
    """The steps of COMMITTED and FINISHING."""

    def __init__(self, way: Journey) -> None:
        self._way = way

    async def activate(self) -> Event | None:
        """Runs the guest at the destination, however long it takes; or learns that it never can have run there."""
        handoff = await self._persist("activate", self._activated)
        if handoff.state in RAN_HERE:
            self._note_running(handoff)
            return None
        if not handoff.never_ran:
            # It may have run, and written to its disks: the held copy is of the past.
            name, where = self._way.migration.guest_name, self._way.migration.destination.host
            self._way.migration.error = (
                f"{name} was moved to {where} and does not run there: {handoff.message}. Start it there"
            )
            return None
        why = handoff.message or "the destination's copy is gone"
        undone = await self._persist(
            "fence",
            lambda: self._way.destination.abort(
                self._way.fence, self._way.migration.id, DESTINATION, f"never ran: {why}"
            ),
        )
        if undone.state in RAN_HERE:
            self._note_running(undone)
            return None
        self._way.migration.error = f"{self._way.migration.destination.host} could not run the guest: {why}"
        return Event.FENCED

    async def _activated(self) -> Handoff:
        """Activate. A copy that was aborted refuses it: its state is the answer, and may be the proof."""
        try:
            return await self._way.destination.activate(self._way.fence, self._way.migration.id)
        except PreconditionError:
            # A leader that ended between the proof and its record has aborted it.
            async with aclosing(self._way.destination.watch(self._way.migration.id, DESTINATION)) as states:
                handoff = await anext(states)
            if handoff.state != HandoffState.HANDOFF_STATE_ABORTED:
                raise
            return handoff

    async def _persist(self, what: str, call: Callable[[], Awaitable[Handoff]]) -> Handoff:
        """Repeats a call for ever: the guest is committed to its host. The operator sees why in the record."""
        while True:
            try:
                return await self._way.insist(call, 10.0, also_refusals=True)
            except StepFailed as failure:
                self._way.log.error("the destination owns the guest but does not answer", call=what, error=str(failure))
                async with self._way.lock:
                    self._way.warn(f"{what}: {failure}")
                    self._way.migration = await self._way.records.save(self._way.migration)

    def _note_running(self, handoff: Handoff) -> None:
        outcome = self._way.migration.outcome
        if self._way.committed_at is not None and self._way.held_at is not None:
            passed_ms = 1000 * (asyncio.get_running_loop().time() - self._way.committed_at)
            outcome.committed_to_running_ms = max(0.0, passed_ms - handoff.activate_timings.running_for_ms)
            outcome.downtime_ms = (
                outcome.paused_to_held_ms + outcome.held_to_committed_ms + outcome.committed_to_running_ms
            )
        else:
            self._way.warn("the leader changed during the pause: downtime_ms is from the clocks of two hosts")
            if outcome.HasField("paused_time"):
                running_ns = handoff.activate_timings.running_time.ToNanoseconds()
                outcome.downtime_ms = max(0.0, (running_ns - outcome.paused_time.ToNanoseconds()) / 1e6)

    async def release_source(self) -> None:
        """Destroys the held copy, now or once its agent is back."""
        released = await self._way.try_for(
            "release",
            self._way.migration.source.host,
            PATIENCE_S,
            lambda: self._way.source.release_source(self._way.fence, self._way.migration.id),
        )
        if released is not None:
            # QEMU's final figures come after "held", when nobody waits for them.
            outcome = self._way.migration.outcome
            outcome.qemu_downtime_ms = released.switch_timings.qemu_downtime_ms or outcome.qemu_downtime_ms
            outcome.ram_bytes = max(outcome.ram_bytes, released.progress.ram_transferred_bytes)
            outcome.iterations = max(outcome.iterations, released.progress.iterations)

    async def finalize_destination(self) -> None:
        """Makes the guest's definition persistent, now or once the agent is back."""
        await self._way.try_for(
            "finalize",
            self._way.migration.destination.host,
            PATIENCE_S,
            lambda: self._way.destination.finalize_destination(self._way.fence, self._way.migration.id),
        )
