"""A committed guest that can't be run, and can't be taken back without a decision: what is asked, and what may be done.

The source holds its copy. It runs again only when the destination's certainly can't: its agent says that it has ended,
or its host is fenced, by the configured command (asked for, or unasked after a while) or by an operator's word. What
the guest may have done at the destination is lost then.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from enum import Enum, auto

from handoff.agent.v1.qemu_pb2 import Handoff, HandoffState
from handoff.controller.v1.migrations_pb2 import Migration
from handoff_common.errors import HandoffError, InvalidArgumentError, PreconditionError
from handoff_controller.decisions import TO_DESTINATION, TO_SOURCE, Asked, Decision, Decisions
from handoff_controller.fencing import Fencing
from handoff_controller.journey import ORDER_LIFE_S, Journey
from handoff_controller.machine import state_of


class Then(Enum):
    """What follows a decision."""

    GO_ON = auto()
    TAKE_BACK = auto()
    """The copy is destroyed, then the source runs."""
    GIVE_UP = auto()
    """The guest stays at the destination, and does not run."""
    FENCED = auto()


class Standstill:
    """What a committed migration does while its destination does not run the guest."""

    def __init__(
        self,
        way: Journey,
        decisions: Decisions,
        fencing: Fencing,
        look: Callable[[], Awaitable[Handoff | None]],
    ) -> None:
        """`look`: the destination's side as its agent tells it; None when that can't be reached."""
        self._way = way
        self._decisions = decisions
        self._fencing = fencing
        self._look = look
        self._silence = ""
        self._fences_at = 0.0

    def begin(self) -> None:
        """The destination is told to run the guest from now on."""
        self._fences_at = asyncio.get_running_loop().time() + self._fencing.automatic_after_s

    async def decide(self, asked: Asked, answer: Handoff | None, *, takes_back: bool) -> Then:
        """Takes a decision, or refuses it. `answer`: how the copy ended, by its agent's word, if it has.

        `takes_back`: the copy is being destroyed already.
        """
        try:
            if answer is not None and not takes_back:
                return self._decide_on_ended(asked, answer)
            if asked.decision.target == TO_DESTINATION and answer is not None:
                asked.refuse(PreconditionError(f"{self._way.at_destination} has no copy any more that could run"))
                return Then.GO_ON
            if asked.decision.target == TO_DESTINATION:
                if self._way.migration.recovery.target != TO_DESTINATION:
                    await self._way.note(_decided_forward(asked.decision, self._way.fence.term))
                asked.take()
                return Then.GO_ON
            how = await self._fenced(asked.decision)
        except (PreconditionError, InvalidArgumentError) as refusal:
            asked.refuse(refusal)
            return Then.GO_ON
        self._take_from(asked.decision, how)
        self._decisions.accept(asked)
        return Then.FENCED

    def _decide_on_ended(self, asked: Asked, answer: Handoff) -> Then:
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
            return Then.TAKE_BACK
        reason = f"{migration.guest_name} ended on {there} as it was resumed there: {answer.message}"
        migration.recovery.CopyFrom(decision.recovery(how=reason))
        self._way.lose(there, reason, certain=True, since=datetime.now(UTC))
        self._decisions.accept(asked)
        return Then.GIVE_UP

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
            # An order that is still on its way is refused by then.
            await asyncio.sleep(max(0.0, ORDER_LIFE_S - self._way.since_heard_s()))
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

    async def bear(self, silence: str) -> bool:
        """Asks the operator, or fences the host unasked where that is configured; tells whether it is fenced."""
        self._silence = problem = silence
        self._way.warn(f"activate: {silence}")
        if self._may_fence_unasked():
            decision = Decision(TO_SOURCE, f"controller {self._way.fence.leader}")
            try:
                self._take_from(decision, await self._fenced(decision))
            except HandoffError as error:
                problem = f"{problem}; {error.message}"
                self._fences_at = asyncio.get_running_loop().time() + self._fencing.automatic_after_s
            else:
                return True
        await self._way.need_decision(self._silence_sentence(problem))
        return False

    def _may_fence_unasked(self) -> bool:
        return (
            self._fencing.automatic_after_s > 0
            and self._way.migration.recovery.target != TO_DESTINATION
            and asyncio.get_running_loop().time() >= self._fences_at
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
        lost = f"what it did on {there}, if it ran there, is lost then"
        if self._fencing.configured:
            return f"{facts}. If it does not come back: `{command}` fences {there} and runs it on {here}; {lost}"
        return f"{facts}. If it does not come back: turn {there} off, then `{command} --i-have-fenced {there}`; {lost}"

    async def ask_about_end(self, answer: Handoff) -> None:
        """Has the operator decide about a copy that ended as it was told to run."""
        migration, there, here = self._way.migration, self._way.at_destination, self._way.at_source
        await self._way.need_decision(
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
