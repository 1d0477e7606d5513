"""What an operator decides for a migration that can't go on by itself, on its way from the RPC to the driver."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from handoff.agent.v1.disk_pb2 import DiskStrategy
from handoff.agent.v1.qemu_pb2 import Handoff
from handoff.controller.v1.migrations_pb2 import Migration, Recovery, RecoveryTarget
from handoff_common.errors import HandoffError, InvalidArgumentError, PreconditionError, UnavailableError
from handoff_controller.journey import Journey, StepFailed
from handoff_controller.machine import CANCELLABLE, FINAL, State, state_of

TO_SOURCE = RecoveryTarget.RECOVERY_TARGET_SOURCE
TO_DESTINATION = RecoveryTarget.RECOVERY_TARGET_DESTINATION


@dataclass(frozen=True, slots=True)
class Decision:
    """As RecoverMigrationRequest."""

    target: "RecoveryTarget.ValueType"
    by: str
    fenced_host: str = ""
    accept_loss: bool = False

    def recovery(self, *, fenced_host: str = "", how: str = "") -> Recovery:
        """As the record keeps it."""
        made = Recovery(target=self.target, by=self.by, fenced_host=fenced_host, how=how)
        made.time.FromDatetime(datetime.now(UTC))
        return made


def is_pulled(migration: Migration) -> bool:
    """The destination may still need the source's disks, which are kept as they were at the switch. Pure."""
    pulls = any(move.strategy == DiskStrategy.DISK_STRATEGY_PULL for move in migration.disks)
    return pulls and not migration.disks_arrived


def is_taken(migration: Migration, decision: Decision) -> bool:
    """Whether the record follows this decision already. Pure."""
    if migration.recovery.target != decision.target:
        return False
    state = state_of(migration)
    if decision.target == TO_DESTINATION:
        gives_up_disks = decision.fenced_host == migration.source.host and is_pulled(migration)
        return state is State.DONE or (state is State.FINISHING and not gives_up_disks)
    # The second of two decisions: the source is given up as well.
    gives_up = decision.fenced_host == migration.source.host and not migration.HasField("loss")
    return state is State.ABORTED or (state is State.ABORTING and not gives_up)


def check_fence(migration: Migration, decision: Decision) -> None:
    """Raises InvalidArgumentError where the word that a host is off has no part in the decision. Pure."""
    fenced, here, there = decision.fenced_host, migration.source.host, migration.destination.host
    if not fenced:
        return
    if fenced not in (here, there):
        raise InvalidArgumentError(f"{fenced} has no part in migration {migration.id}, which is from {here} to {there}")
    if decision.target != TO_DESTINATION:
        return
    name, command = migration.guest_name, f"handoff recover {migration.id}"
    if fenced == there:
        raise InvalidArgumentError(
            f"{name} can't go on at {there} when {there} is off. Say `{command} --to destination` to wait for {there},"
            f" or `{command} --to source --i-have-fenced {there}` to run it on {here}"
        )
    if state_of(migration) is State.COMMITTED:
        raise InvalidArgumentError(
            f"{there} is to run {name}, and needs nothing of {here} for that: whether {here} is off makes no difference"
            f" yet. Say `{command} --to destination` to wait for {there}"
        )


def check_decidable(migration: Migration, decision: Decision) -> None:
    """Raises PreconditionError where there is nothing to decide. Pure."""
    state, name = state_of(migration), f"migration {migration.id}"
    if state in FINAL:
        raise PreconditionError(f"{name} is {state.name} already")
    if state in CANCELLABLE:
        raise PreconditionError(
            f"{name} is {state.name}: nothing is to be decided yet. It goes on, or is undone, by itself;"
            f" `handoff cancel {migration.id}` undoes it now"
        )
    if state is State.FINISHING and not is_pulled(migration):
        raise PreconditionError(
            f"{name} is FINISHING: {migration.guest_name} has run on {migration.destination.host}, and the copy on"
            f" {migration.source.host} is of the past. To bring it back, migrate it"
        )
    if decision.target not in (TO_SOURCE, TO_DESTINATION):
        raise InvalidArgumentError("target: say whether the guest is to go on at the source or at the destination")


class Asked:
    """A decision whose caller waits to hear whether it is taken."""

    def __init__(self, decision: Decision) -> None:
        self.decision = decision
        self._verdict: asyncio.Future[HandoffError | None] = asyncio.get_running_loop().create_future()

    def take(self) -> None:
        """It is carried out, and in the record."""
        if not self._verdict.done():
            self._verdict.set_result(None)

    def refuse(self, why: HandoffError) -> None:
        """It is not, and changes nothing."""
        if not self._verdict.done():
            self._verdict.set_result(why)

    async def verdict(self) -> None:
        """Returns when it is taken. Raises what it was refused with."""
        refusal = await asyncio.shield(self._verdict)
        if refusal is not None:
            raise refusal


class Decisions:
    """Those that wait to be looked at, are being looked at, or are carried out but not in the record yet."""

    def __init__(self) -> None:
        self._asked: asyncio.Queue[Asked] = asyncio.Queue()
        self._accepted: list[Asked] = []
        self._unanswered: set[Asked] = set()
        self._closed = False

    async def ask(self, decision: Decision) -> None:
        """Puts a decision before the driver; returns when it is in the record.

        Raises what it is refused with, and UnavailableError when nobody looks at it any more.
        """
        asked = Asked(decision)
        if self._closed:
            raise _too_late()
        self._asked.put_nowait(asked)
        self._unanswered.add(asked)
        try:
            await asked.verdict()
        finally:
            self._unanswered.discard(asked)

    async def next(self) -> Asked:
        """Waits for one."""
        return await self._asked.get()

    def accept(self, asked: Asked) -> None:
        """It is carried out; the next state of the record will say so."""
        self._accepted.append(asked)

    def recorded(self) -> None:
        """The next state is in the record."""
        for asked in self._accepted:
            asked.take()
        self._accepted.clear()

    def close(self) -> None:
        """Nobody looks at them any more: the migration is final, or its driver has failed."""
        self._closed = True
        for asked in self._unanswered:
            asked.refuse(_too_late())
        self._accepted.clear()

    async def answer_or_decision(
        self, way: Journey, call: Callable[[], Awaitable[Handoff]] | None, patience_s: float
    ) -> Handoff | Asked | str:
        """An agent's answer, a decision that came first, or why there is no answer after `patience_s` seconds.

        Without a call it waits for a decision.
        """
        asked = asyncio.create_task(self.next())
        tasks: set[asyncio.Task[Handoff] | asyncio.Task[Asked]] = {asked}
        answer: asyncio.Task[Handoff] | None = None
        if call is not None:
            answer = asyncio.create_task(_insist(way, call, patience_s))
            tasks.add(answer)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if asked.done() or answer is None:
                return asked.result()
            try:
                return answer.result()
            except StepFailed as failure:
                return str(failure)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _too_late() -> UnavailableError:
    return UnavailableError("the migration has just gone on: look at it (`handoff show`), and decide again if need be")


async def _insist(way: Journey, call: Callable[[], Awaitable[Handoff]], patience_s: float) -> Handoff:
    return await way.insist(call, patience_s, also_refusals=True)
