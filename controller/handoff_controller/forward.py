"""After the commit: the guest is run at its destination, however long it takes, and the source cleaned up.

There is one way back: the destination's copy can't run any more. Either its agent says so (it never ran and is
destroyed), or its host is fenced: by the configured command, or by the operator's word. Where it may have run before
its end, or nobody can tell, the source stays held until an operator decides.
"""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from datetime import UTC, datetime
from enum import Enum, auto

from handoff.agent.v1.qemu_pb2 import Handoff, HandoffState
from handoff.controller.v1.migrations_pb2 import Migration
from handoff_common.errors import HandoffError, InvalidArgumentError, PreconditionError
from handoff_controller.decisions import TO_DESTINATION, TO_SOURCE, Asked, Decision, Decisions
from handoff_controller.fencing import Fencing
from handoff_controller.journey import DESTINATION, RAN_HERE, Journey, StepFailed
from handoff_controller.machine import Event, state_of

# How long the destination may be silent before the operator is asked.
DECISION_AFTER_S = 10.0
LOOK_S = 4.0
FINISHING_PATIENCE_S = 30.0


class _Then(Enum):
    """What follows a decision."""

    GO_ON = auto()
    TAKE_BACK = auto()
    """The copy is destroyed, then the source runs."""
    GIVE_UP = auto()
    """The guest stays at the destination, and does not run."""
    FENCED = auto()


class Forward:
    """The steps of COMMITTED and FINISHING."""

    def __init__(self, way: Journey, decisions: Decisions, fencing: Fencing) -> None:
        self._way = way
        self._decisions = decisions
        self._fencing = fencing
        self._silence = ""
        self._fenced_again_at = 0.0

    async def activate(self) -> Event | None:
        """Runs the guest at the destination, however long it takes; or learns that it can't run there."""
        answer: Handoff | None = None
        takes_back = False
        self._fenced_again_at = asyncio.get_running_loop().time() + self._fencing.automatic_after_s
        while True:
            call = self._activated if answer is None else self._destroyed if takes_back else None
            match await self._decisions.answer_or_decision(self._way, call, DECISION_AFTER_S):
                case Handoff() as handoff if handoff.state in RAN_HERE:
                    self._note_running(handoff)
                    return None
                case Handoff() as handoff if answer is not None:
                    why = answer.message or "the destination's copy is gone"
                    self._way.migration.error = f"{self._way.at_destination} could not run the guest: {why}"
                    return Event.FENCED
                case Handoff() as answer:
                    takes_back = answer.never_ran
                    if not takes_back:
                        await self._way.need_decision(self._ended_sentence(answer))
                case Asked() as asked:
                    match await self._decide(asked, answer, takes_back=takes_back):
                        case _Then.TAKE_BACK:
                            takes_back = True
                        case _Then.GIVE_UP:
                            return None
                        case _Then.FENCED:
                            return Event.FENCED
                case str() as silence:
                    self._silence = silence
                    if await self._bear_silence():
                        return Event.FENCED

    async def release_source(self) -> None:
        """Destroys the held copy, now or once its agent is back."""
        released = await self._way.try_for(
            "release",
            self._way.at_source,
            FINISHING_PATIENCE_S,
            lambda: self._way.source.release_source(self._way.fence, self._way.migration.id),
        )
        if released is not None:
            # QEMU's final figures come after "held", when nobody waits for them.
            outcome = self._way.migration.outcome
            outcome.qemu_downtime_ms = released.switch_timings.qemu_downtime_ms or outcome.qemu_downtime_ms
            outcome.ram_bytes = max(outcome.ram_bytes, released.progress.ram_transferred_bytes)
            outcome.iterations = max(outcome.iterations, released.progress.iterations)

    async def finalize_destination(self) -> None:
        """Makes the guest's definition persistent, now or once the agent is back; sees whether it still runs."""
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
            migration = self._way.migration
            return await self._way.destination.activate(
                self._way.fence, migration.id, keep_paused=migration.stays_paused
            )
        except PreconditionError:
            # A leader that ended between the proof and its record has aborted it.
            handoff = await self._seen()
            if handoff.state != HandoffState.HANDOFF_STATE_ABORTED:
                raise
            return handoff

    async def _destroyed(self) -> Handoff:
        return await self._way.destination.abort(
            self._way.fence, self._way.migration.id, DESTINATION, f"the guest goes on at {self._way.at_source}"
        )

    async def _seen(self) -> Handoff:
        async with aclosing(self._way.destination.watch(self._way.migration.id, DESTINATION)) as states:
            return await anext(states)

    async def _look(self) -> Handoff | None:
        """The destination's side as its agent tells it; None when that can't be reached."""
        try:
            return await self._way.insist(self._seen, LOOK_S)
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

    # Decisions.

    async def _decide(self, asked: Asked, answer: Handoff | None, *, takes_back: bool) -> _Then:
        try:
            if answer is not None and not takes_back:
                return self._decide_on_ended(asked, answer)
            if asked.decision.target == TO_DESTINATION and answer is not None:
                asked.refuse(PreconditionError(f"{self._way.at_destination} has no copy any more that could run"))
                return _Then.GO_ON
            if asked.decision.target == TO_DESTINATION:
                await self._way.note(_decided_forward(asked.decision, self._way.fence.term))
                asked.take()
                return _Then.GO_ON
            how = await self._fenced(asked.decision)
        except (PreconditionError, InvalidArgumentError) as refusal:
            asked.refuse(refusal)
            return _Then.GO_ON
        self._take_from(asked.decision, how)
        self._decisions.accept(asked)
        return _Then.FENCED

    def _decide_on_ended(self, asked: Asked, answer: Handoff) -> _Then:
        """The copy's agent answers: nothing has to be fenced. Raises PreconditionError."""
        migration, there, here = self._way.migration, self._way.at_destination, self._way.at_source
        decision = asked.decision
        if not decision.accept_loss:
            raise PreconditionError(
                f"{migration.guest_name} may have run on {there} before it ended there ({answer.message}). To run the"
                f" copy that {here} holds loses what it did since, and its disks may be ahead of its memory; to leave"
                f" it to {there} destroys that copy, and it has to be started from its disks. Say --accept-loss"
            )
        if decision.target == TO_SOURCE:
            how = f"its copy on {there} has ended; it may have run there for a moment"
            migration.recovery.CopyFrom(decision.recovery(how=how))
            self._decisions.accept(asked)
            return _Then.TAKE_BACK
        reason = f"{migration.guest_name} ended on {there} as it was resumed there: {answer.message}"
        migration.recovery.CopyFrom(decision.recovery(how=reason))
        self._way.lose(there, reason, certain=True, since=datetime.now(UTC))
        self._decisions.accept(asked)
        return _Then.GIVE_UP

    async def _fenced(self, decision: Decision) -> str:
        """Makes sure that the destination's copy can't run, and says how. Raises PreconditionError when it may."""
        there, name = self._way.at_destination, self._way.migration.guest_name
        if self._way.at_source == there:
            raise PreconditionError(f"both copies of {name} are on {there}: nothing can be fenced; start its agent")
        if decision.fenced_host not in ("", there):
            raise InvalidArgumentError(f"the copy of {name} that may run is on {there}, not on {decision.fenced_host}")
        seen = await self._look()
        if seen is not None:
            state = HandoffState.Name(seen.state).removeprefix("HANDOFF_STATE_")
            hint = f" ({self._silence})" if self._silence else ""
            raise PreconditionError(
                f"{there} is not off: its agent answers, its copy of {name} is {state}, and it is being told to run"
                f" it{hint}. Look again in a moment; if it can't, turn {there} off first"
            )
        if decision.fenced_host:
            return f"{there} is fenced, by the word of {decision.by}"
        if not self._fencing.configured:
            raise PreconditionError(
                f"{there} does not answer, so {name} may run there: running it on {self._way.at_source} too would"
                f" destroy it. No fence command is configured: make sure that {there} is off, then say"
                f" --i-have-fenced {there}"
            )
        return await self._fencing.fence(there)

    def _take_from(self, decision: Decision, how: str) -> None:
        there = self._way.at_destination
        self._way.migration.recovery.CopyFrom(decision.recovery(fenced_host=there, how=how))
        self._way.migration.error = f"{there} did not answer after the commit; {how} (decided by {decision.by})"

    async def _bear_silence(self) -> bool:
        """Asks the operator, or fences the host unasked where that is configured; tells whether it is fenced."""
        self._way.warn(f"activate: {self._silence}")
        problem = self._silence
        if self._may_fence_unasked():
            decision = Decision(TO_SOURCE, f"controller {self._way.fence.leader}")
            try:
                self._take_from(decision, await self._fenced(decision))
            except HandoffError as error:
                problem = f"{problem}; {error.message}"
                self._fenced_again_at = asyncio.get_running_loop().time() + self._fencing.automatic_after_s
            else:
                return True
        await self._way.need_decision(self._silence_sentence(problem))
        return False

    def _may_fence_unasked(self) -> bool:
        return (
            self._fencing.automatic_after_s > 0
            and self._way.migration.recovery.target != TO_DESTINATION
            and asyncio.get_running_loop().time() >= self._fenced_again_at
        )

    def _silence_sentence(self, problem: str) -> str:
        migration, there, here = self._way.migration, self._way.at_destination, self._way.at_source
        facts = (
            f"{migration.guest_name} belongs to {there} since the commit, and nobody knows whether it runs there:"
            f" {problem}. It is held on {here}, paused and complete; once {there} answers, it goes on by itself"
        )
        if here == there:
            return f"{facts}. Start the agent of {there}, and see that libvirt answers"
        command = f"handoff recover {migration.id} --to source"
        if self._fencing.configured:
            return f"{facts}. If it does not come back: `{command}` fences {there}, then runs it on {here}"
        return f"{facts}. If it does not come back: turn {there} off, then `{command} --i-have-fenced {there}`"

    def _ended_sentence(self, answer: Handoff) -> str:
        migration, there, here = self._way.migration, self._way.at_destination, self._way.at_source
        return (
            f"{migration.guest_name} ended on {there} as it was resumed there ({answer.message}): it may have run for a"
            f" moment, and written to its disks. {here} still holds the copy of the moment before. Either `handoff"
            f" recover {migration.id} --to source --accept-loss` runs that one, or `--to destination --accept-loss`"
            f" destroys it, and the guest is to be started on {there} from its disks"
        )


def _decided_forward(decision: Decision, term: int) -> Callable[[Migration], None]:
    def change(migration: Migration) -> None:
        migration.recovery.CopyFrom(decision.recovery(how="it waits for the destination, however long that takes"))
        line = migration.timeline.add(state=state_of(migration).value, term=term)
        line.time.CopyFrom(migration.recovery.time)
        line.reason = f"{decision.by} decided to wait for {migration.destination.host}"

    return change
