"""The disks of a guest that has moved: as long as its destination pulls some, the source's are needed.

The source holds its copy meanwhile, so a destination that is lost for good is not the end of the guest: it can go on at
the source from the moment of the switch. A source that is lost for good takes along what had not been pulled. Either is
an operator's decision; without one the migration waits, and goes on by itself when the silent side is back.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Final

from handoff.agent.v1.disk_pb2 import DiskPhase
from handoff.agent.v1.qemu_pb2 import Handoff, HandoffState
from handoff.controller.v1.migrations_pb2 import Migration
from handoff_common.errors import HandoffError, InvalidArgumentError, PreconditionError, UnavailableError
from handoff_controller.decisions import TO_SOURCE, Asked, Decision, Decisions, is_pulled
from handoff_controller.fencing import Fencing
from handoff_controller.journey import DESTINATION, Journey, StepFailed
from handoff_controller.machine import Event, State

PROGRESS_INTERVAL_S: Final = 1.0
# A destination that is silent, or gets nothing, for longer is told of; the wait goes on.
PATIENCE_S: Final = 10.0
RETRY_S: Final = 1.0
LOOK_S: Final = 4.0


class ArrivingDisks:
    """Waits until the destination has all."""

    def __init__(
        self, way: Journey, decisions: Decisions, fencing: Fencing, look: Callable[[], Awaitable[Handoff | None]]
    ) -> None:
        """`look`: the destination's side as its agent tells it; None when that can't be reached."""
        self._way = way
        self._decisions = decisions
        self._fencing = fencing
        self._look = look
        self._all_there = asyncio.Event()
        self._well_at = asyncio.get_running_loop().time()
        """When the destination last got something, or was not heard to get nothing."""
        self._sentence = ""

    async def arrive(self) -> Event | None:
        """Waits for as long as it takes. FENCED when it is decided that the guest goes on at the source."""
        while is_pulled(self._way.migration):
            match await self._decisions.answer_or_decision(self._way, self._pulled, 0.0):
                case Handoff(pulling=True):
                    await self._way.note(partial(_need, sentence=self._sentence))
                case Handoff():
                    # In the record before anything follows from it: from here on nothing can be taken back.
                    await self._way.note(_arrived)
                case Asked() as asked:
                    if await self._takes_back(asked):
                        return Event.FENCED
                case str() as silence:
                    await self._way.need_decision(self._about_destination(silence))
        self._all_there.set()
        return None

    async def wait(self) -> None:
        """Returns once nothing of the source's disks is needed any more."""
        await self._all_there.wait()

    async def _pulled(self) -> Handoff:
        """Follows the destination until it needs nothing of the source, or there is something else to tell.

        Raises once it is silent for PATIENCE_S.
        """
        loop = asyncio.get_running_loop()
        published_at = 0.0
        heard_at = loop.time()
        while True:
            silence = UnavailableError("its agent ended the watch")
            try:
                async with aclosing(self._way.destination.watch(self._way.migration.id, DESTINATION)) as states:
                    async for handoff in states:
                        if not handoff.pulling:
                            return handoff
                        if handoff.state == HandoffState.HANDOFF_STATE_ABORTED:
                            continue
                        heard_at = loop.time()
                        if self._judge(handoff, heard_at) != self._way.migration.needs_decision:
                            return handoff
                        if heard_at - published_at > PROGRESS_INTERVAL_S:
                            published_at = heard_at
                            await self._way.records.put_progress(self._way.migration.id, handoff.progress)
            except HandoffError as error:
                silence = UnavailableError(error.message)
            if loop.time() - heard_at > PATIENCE_S:
                raise silence
            await asyncio.sleep(min(RETRY_S, PATIENCE_S))

    def _judge(self, handoff: Handoff, now_s: float) -> str:
        """What is to be told of a destination that answers."""
        trouble = _trouble(handoff)
        if not trouble:
            self._well_at = now_s
        self._sentence = self._about_source(trouble) if now_s - self._well_at > PATIENCE_S else ""
        return self._sentence

    # What an operator may decide.

    async def _takes_back(self, asked: Asked) -> bool:
        """Carries a decision out, or refuses it; whether the guest goes on at the source."""
        try:
            if asked.decision.target == TO_SOURCE:
                await self._take_back(asked.decision)
                self._decisions.accept(asked)
                return True
            await self._do_without(asked.decision)
        except (PreconditionError, InvalidArgumentError) as refusal:
            asked.refuse(refusal)
        else:
            asked.take()
        return False

    async def _take_back(self, decision: Decision) -> None:
        """Makes sure that the destination's copy can't run, and the source's can. Raises PreconditionError."""
        migration, there, here = self._way.migration, self._way.at_destination, self._way.at_source
        name = migration.guest_name
        if not decision.accept_loss:
            raise PreconditionError(
                f"{name} has run on {there} since {_switched_at(migration)}: the copy on {here} is of that moment, and"
                " what it did since is lost with it. Say --accept-loss"
            )
        if decision.fenced_host not in ("", there):
            raise InvalidArgumentError(f"the copy of {name} that may run is on {there}, not on {decision.fenced_host}")
        if await self._look() is not None:
            raise PreconditionError(
                f"{there} is not off: its agent answers, and it pulls what it lacks. Turn it off first"
            )
        held = await self._see_source()
        if held is None or held.state != HandoffState.HANDOFF_STATE_HELD:
            state = "silent" if held is None else HandoffState.Name(held.state).removeprefix("HANDOFF_STATE_")
            raise PreconditionError(f"{here} can't run {name}: its side of the migration is {state}")
        if decision.fenced_host:
            how = f"{there} is fenced, by the word of {decision.by}"
        else:
            how = await self._fencing.fence(there)
        migration.recovery.CopyFrom(decision.recovery(fenced_host=there, how=how))
        migration.error = (
            f"{there} did not answer while it pulled the disks of {name}; {how} (decided by {decision.by}). It goes on"
            f" from {_switched_at(migration)}"
        )

    async def _do_without(self, decision: Decision) -> None:
        """Ends the wait for a source that is gone. Raises PreconditionError."""
        migration, there, here = self._way.migration, self._way.at_destination, self._way.at_source
        if decision.fenced_host != here or not decision.accept_loss:
            raise PreconditionError(
                f"migration {migration.id} waits for {there} and for {here} by itself, however long that takes. If"
                f" {here} is off for good, what {there} has not pulled is lost: say --i-have-fenced {here}"
                " --accept-loss"
            )
        if await self._see_source() is not None:
            raise PreconditionError(f"{here} answers: {there} pulls from it as soon as it can")
        await self._way.note(partial(_given_up, decision=decision))

    async def _see_source(self) -> Handoff | None:
        """The source's side; None when its agent can't be reached."""
        try:
            return await self._way.insist(self._way.see_source, LOOK_S)
        except StepFailed:
            return None

    # What an operator is told.

    def _about_destination(self, silence: str) -> str:
        migration, there, here = self._way.migration, self._way.at_destination, self._way.at_source
        word = "" if self._fencing.configured else f" --i-have-fenced {there}"
        back = f"`handoff recover {migration.id} --to source{word} --accept-loss`"
        back = f"{back} fences it and" if self._fencing.configured else f"turn it off, then {back}"
        return (
            f"{migration.guest_name} has run on {there} since {_switched_at(migration)}, and {there} does not tell how"
            f" far its disks are: {silence}. It goes on by itself when {there} is back. {here} keeps its disks, and the"
            f" guest, paused, as they were at the switch. If {there} does not come back: {back}"
            f" runs it on {here} from that moment; what it did since is lost then"
        )

    def _about_source(self, trouble: str) -> str:
        migration, there, here = self._way.migration, self._way.at_destination, self._way.at_source
        return (
            f"{migration.guest_name} runs on {there} and does not get the rest of its disks from {here}: {trouble}. It"
            f" goes on by itself when that is over. If {here} is off for good, what is missing is lost: `handoff"
            f" recover {migration.id} --to destination --i-have-fenced {here} --accept-loss` ends the migration"
        )


def _trouble(handoff: Handoff) -> str:
    """What keeps the destination from pulling, by its agent's word."""
    pulled = [disk for disk in handoff.progress.disks if disk.phase == DiskPhase.DISK_PHASE_PULLING]
    return next((disk.decision for disk in pulled if disk.decision), "")


def _switched_at(migration: Migration) -> str:
    """When the guest was the destination's, in UTC: "13:05:07 UTC"."""
    committed = (change.time for change in migration.timeline if change.state == State.COMMITTED.value)
    moment = next(committed, None)
    return "the switch" if moment is None else f"{moment.ToDatetime():%H:%M:%S} UTC"


def _need(migration: Migration, sentence: str) -> None:
    migration.needs_decision = sentence


def _arrived(migration: Migration) -> None:
    migration.disks_arrived = True
    migration.needs_decision = ""


def _given_up(migration: Migration, decision: Decision) -> None:
    """The source's images stay: what is missing is nowhere else, should its host come back after all."""
    here, there, name = migration.source.host, migration.destination.host, migration.guest_name
    how = f"{here} is off for good, by the word of {decision.by}"
    migration.recovery.CopyFrom(decision.recovery(fenced_host=here, how=how))
    migration.options.keep_source_disks = True
    migration.disks_arrived = True
    migration.needs_decision = ""
    missing = ", ".join(move.target for move in migration.disks if move.base_uri)
    migration.warnings.append(
        f"{how}, while {there} still pulled {missing} from it: {name} is not whole, and its reads of what is missing"
        f" wait. Destroy it on {there} and restore those disks; should {here} come back, its images are kept"
    )
