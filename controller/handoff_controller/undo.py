"""The abort: the guest runs at its source again, and the destination's copy goes."""

from datetime import UTC, datetime

from handoff.agent.v1.qemu_pb2 import Handoff, HandoffState
from handoff_common.errors import PreconditionError
from handoff_controller.decisions import TO_SOURCE, Asked, Decision, Decisions
from handoff_controller.fencing import Fencing
from handoff_controller.journey import DESTINATION, SOURCE, TRANSIENT, Journey, StepFailed
from handoff_controller.machine import is_taken_back

DECISION_AFTER_S = 10.0
DESTINATION_PATIENCE_S = 30.0
LOOK_S = 4.0
# Of a host that is off nothing is expected.
FENCED_PATIENCE_S = 0.0


class Undo:
    """The steps of ABORTING."""

    def __init__(self, way: Journey, decisions: Decisions, fencing: Fencing) -> None:
        self._way = way
        self._decisions = decisions
        self._fencing = fencing

    async def abort_source(self) -> None:
        """Lets the guest run at the source again. There is no giving up, unless an operator gives up that host."""
        while True:
            match await self._decisions.answer_or_decision(self._way, self._aborted, DECISION_AFTER_S):
                case Handoff() as handoff:
                    outcome = self._way.migration.outcome
                    outcome.downtime_ms = handoff.switch_timings.paused_to_resumed_ms
                    if handoff.state == HandoffState.HANDOFF_STATE_FAILED:
                        name, here = self._way.migration.guest_name, self._way.at_source
                        reason = f"{name} was to run on at {here}, but {handoff.message}. Start it from its disks"
                        self._way.lose(here, reason, certain=True, since=datetime.now(UTC))
                    elif handoff.message and handoff.message not in self._way.migration.error:
                        self._way.warn(f"{self._way.at_source}: {handoff.message}")
                    return
                case Asked() as asked:
                    try:
                        await self._lose_source(asked.decision)
                    except PreconditionError as refusal:
                        asked.refuse(refusal)
                    else:
                        self._decisions.accept(asked)
                        return
                case str() as failure:
                    self._way.warn(f"{self._way.at_source} does not confirm the abort, which goes on: {failure}")
                    await self._way.need_decision(self._sentence(failure))

    async def abort_destination(self) -> None:
        """Destroys the destination's copy, now or once its agent is back."""
        there = self._way.at_destination
        # Not by who is fenced now: the source may be, and given up, meanwhile.
        back = is_taken_back(self._way.migration)
        is_fenced = self._way.migration.recovery.fenced_host == there
        try:
            await self._way.insist(
                lambda: self._way.destination.abort(
                    self._way.fence, self._way.migration.id, DESTINATION, self._way.migration.error, fenced=back
                ),
                FENCED_PATIENCE_S if is_fenced else DESTINATION_PATIENCE_S,
                also_refusals=True,
            )
        except StepFailed as failure:
            never = "" if back else "It never ran, and is"
            self._way.warn(
                f"the copy on {there} has not been removed: {failure}. {never or 'It is'} removed when the host's agent"
                " is back"
            )

    async def _aborted(self) -> Handoff:
        return await self._way.source.abort(self._way.fence, self._way.migration.id, SOURCE, self._way.migration.error)

    async def _lose_source(self, decision: Decision) -> None:
        """Gives up a source that is gone for good, and the guest with it. Raises PreconditionError."""
        migration, here = self._way.migration, self._way.at_source
        if decision.target != TO_SOURCE:
            raise PreconditionError(
                f"migration {migration.id} is being undone: {self._way.at_destination} must not run"
                f" {migration.guest_name} any more"
            )
        if not decision.accept_loss or decision.fenced_host not in ("", here):
            raise PreconditionError(
                f"migration {migration.id} is being undone and waits for {here}. If {here} is off for good,"
                f" {migration.guest_name} is lost with it: say --i-have-fenced {here} --accept-loss"
            )
        if await self._answers():
            raise PreconditionError(
                f"{here} is not off: its agent answers, and is being told to run {migration.guest_name}. Look again in"
                f" a moment; if it can't, turn {here} off first"
            )
        if decision.fenced_host:
            how = f"{here} is fenced, by the word of {decision.by}"
        else:
            how = await self._fencing.fence(here)
        migration.recovery.CopyFrom(decision.recovery(fenced_host=here, how=how))
        reason = f"{how} while {migration.guest_name} was to run on there"
        self._way.lose(here, reason, certain=True, since=datetime.now(UTC))

    async def _answers(self) -> bool:
        """The source's agent does."""
        try:
            await self._way.insist(self._way.see_source, LOOK_S)
        except StepFailed as failure:
            return not isinstance(failure.__cause__, TRANSIENT)
        return True

    def _sentence(self, failure: str) -> str:
        migration, here = self._way.migration, self._way.at_source
        return (
            f"{migration.guest_name} belongs to {here}, and may stand still there until its agent answers: {failure}."
            f" It goes on by itself then. If {here} is off for good: `handoff recover {migration.id} --to source"
            f" --i-have-fenced {here} --accept-loss` gives the guest up"
        )
