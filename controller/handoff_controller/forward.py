"""After the commit: the guest is run at its destination, however long it takes, and the source cleaned up.

There is one way back: the destination's copy can't run any more. Either its agent says so (it never ran and is
destroyed), or it is decided so: see standstill.py, and disks.py for a guest whose disks are still pulled.
"""

import asyncio
from datetime import UTC, datetime
from typing import Protocol

from handoff.agent.v1.qemu_pb2 import Handoff, HandoffState
from handoff_common.errors import HandoffError, PreconditionError
from handoff_controller.decisions import Asked, Decisions
from handoff_controller.disks import ArrivingDisks
from handoff_controller.fencing import Fencing
from handoff_controller.journey import DESTINATION, RAN_HERE, Journey, StepFailed
from handoff_controller.machine import Event
from handoff_controller.standstill import Standstill, Then

# How long the destination may be silent before the operator is asked.
DECISION_AFTER_S = 10.0
LOOK_S = 4.0
FINISHING_PATIENCE_S = 30.0


class Peers(Protocol):
    """All hosts, as far as they send frames to guests; see network_keeper.py."""

    def look_again(self) -> None:
        """Where guests are, or are about to be, may have changed."""

    async def point(self) -> str:
        """Tells all hosts where guests are. Returns which have not heard it. Raises as the store does."""


class Forward:
    """The steps of COMMITTED and FINISHING."""

    def __init__(self, way: Journey, decisions: Decisions, fencing: Fencing, peers: Peers | None = None) -> None:
        """Without `peers`, nobody is told where the guest is."""
        self._way = way
        self._peers = peers
        self._peers_pointed = asyncio.Event()
        self.disks = ArrivingDisks(way, decisions, fencing, self._look)
        self._decisions = decisions
        self._standstill = Standstill(way, decisions, fencing, self._look)

    async def activate(self) -> Event | None:
        """Runs the guest at the destination, however long it takes; or learns that it can't run there."""
        answer: Handoff | None = None
        takes_back = False
        self._standstill.begin()
        while True:
            call = self._activated if answer is None else self._destroyed if takes_back else None
            match await self._decisions.answer_or_decision(self._way, call, DECISION_AFTER_S):
                case Handoff() as handoff if handoff.state in RAN_HERE:
                    self._note_running(handoff)
                    return None
                case Handoff() as handoff if answer is not None:
                    why = answer.message or "the destination's copy is gone"
                    by = self._way.migration.recovery.by
                    self._way.migration.error = f"{self._way.at_destination} could not run the guest: {why}" + (
                        f" (taken back by {by})" if by else ""
                    )
                    return Event.FENCED
                case Handoff() as answer:
                    takes_back = answer.never_ran
                    if not takes_back:
                        await self._standstill.ask_about_end(answer)
                case Asked() as asked:
                    match await self._standstill.decide(asked, answer, takes_back=takes_back):
                        case Then.TAKE_BACK:
                            takes_back = True
                        case Then.GIVE_UP:
                            return None
                        case Then.FENCED:
                            return Event.FENCED
                case str() as silence:
                    if await self._standstill.bear(silence):
                        return Event.FENCED

    async def point_peers(self) -> None:
        """Tells all hosts where the guest is now. Its source has sent its frames on so far, and does until released."""
        try:
            missing = "" if self._peers is None else await self._peers.point()
        except HandoffError as error:
            missing = error.message
        finally:
            self._peers_pointed.set()
        if missing:
            self._way.warn(f"not told yet where the guest is: {missing}. It is done as soon as possible")

    async def release_source(self) -> None:
        """Destroys the held copy, now or once its agent is back; its frames are sent on until all peers were told."""
        await self._peers_pointed.wait()
        await self.disks.wait()
        released = await self._way.try_for(
            "release",
            self._way.at_source,
            FINISHING_PATIENCE_S,
            lambda: self._way.source.release_source(
                self._way.fence, self._way.migration.id, keep_disks=self._way.migration.options.keep_source_disks
            ),
        )
        if released is not None:
            # QEMU's final figures come after "held", when nobody waits for them.
            outcome = self._way.migration.outcome
            outcome.qemu_downtime_ms = released.switch_timings.qemu_downtime_ms or outcome.qemu_downtime_ms
            outcome.ram_bytes = max(outcome.ram_bytes, released.progress.ram_transferred_bytes)
            outcome.iterations = max(outcome.iterations, released.progress.iterations)

    async def finalize_destination(self) -> None:
        """Makes the guest's definition persistent, now or once the agent is back; sees whether it still runs."""
        await self.disks.wait()
        began = datetime.now(UTC)
        where, name = self._way.at_destination, self._way.migration.guest_name
        finalized = await self._way.try_for(
            "finalize",
            where,
            FINISHING_PATIENCE_S,
            lambda: self._way.destination.finalize_destination(self._way.fence, self._way.migration.id),
        )
        if self._way.migration.HasField("loss"):
            return
        if finalized is not None and finalized.ended:
            self._way.lose(where, f"{name} ran on {where}, and its QEMU ended there", certain=True, since=began)
        elif finalized is None and await self._look() is None:
            reason = f"{name} ran on {where}, which has not answered since"
            self._way.lose(where, reason, certain=False, since=began)

    # The destination's word.

    async def _activated(self) -> Handoff:
        """Activate. A copy that was aborted refuses it: its state is the answer, and may be the proof."""
        try:
            return await self._way.activate()
        except PreconditionError:
            # A leader that ended between the proof and its record has aborted it.
            handoff = await self._way.see_destination()
            if handoff.state != HandoffState.HANDOFF_STATE_ABORTED:
                raise
            return handoff

    async def _destroyed(self) -> Handoff:
        return await self._way.destination.abort(
            self._way.fence, self._way.migration.id, DESTINATION, f"the guest goes on at {self._way.at_source}"
        )

    async def _look(self) -> Handoff | None:
        """The destination's side as its agent tells it; None when that can't be reached."""
        try:
            return await self._way.insist(self._way.see_destination, LOOK_S)
        except StepFailed:
            return None

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
