"""One migration on its way, as the steps of its driver share it: its record, its two agents, and patience with them."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from datetime import datetime
from typing import Protocol, TypeVar

import structlog

from handoff.agent.v1.qemu_pb2 import Handoff, HandoffRole, HandoffState, TransferProgress
from handoff.agent.v1.types_pb2 import Fence
from handoff.controller.v1.migrations_pb2 import GuestLoss, Migration
from handoff_common.errors import DeadlineError, HandoffError, UnavailableError
from handoff_controller.agents import Agent

log = structlog.get_logger()
Answer = TypeVar("Answer")

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0
# An agent runs no guest on an order by a leader that heard from it longer ago (order_age.py).
ORDER_LIFE_S = 10.0
FRESH_S = 3.0

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


class Journey:
    """The record as it is now, and who is asked to do what. `lock` is held by who reads, changes and saves it."""

    def __init__(self, migration: Migration, records: Records, source: Agent, destination: Agent, fence: Fence) -> None:
        self.migration = migration
        self.records = records
        self.source = source
        self.destination = destination
        self.fence = fence
        self.lock = asyncio.Lock()
        self.held_at: float | None = None
        """When the source was held, by the loop's clock; None when another leader saw it."""
        self.committed_at: float | None = None
        self._heard_clock_ms = 0
        self._heard_at = asyncio.get_running_loop().time()
        self._is_fresh = False
        self.log = log.bind(migration=migration.id, guest=migration.guest_name, term=fence.term)

    @property
    def at_source(self) -> str:
        """Name of the source's host."""
        return self.migration.source.host

    @property
    def at_destination(self) -> str:
        """Name of the destination's host."""
        return self.migration.destination.host

    async def see_destination(self) -> Handoff:
        """The destination's side as its agent tells it. Raises what Agent.watch raises."""
        handoff = await _first(self.destination.watch(self.migration.id, DESTINATION), self.at_destination)
        self._heard_clock_ms, self._heard_at = handoff.clock_ms, asyncio.get_running_loop().time()
        self._is_fresh = True
        return handoff

    async def see_source(self) -> Handoff:
        """The source's side as its agent tells it. Raises what Agent.watch raises."""
        return await _first(self.source.watch(self.migration.id, SOURCE), self.at_source)

    def since_heard_s(self) -> float:
        """How long ago the destination's agent was last seen by us, or may have been by another leader."""
        return asyncio.get_running_loop().time() - self._heard_at

    async def activate(self) -> Handoff:
        """Tells the destination to run the guest, with a fresh word of its own: an older order is refused."""
        if not self._is_fresh or self.since_heard_s() > FRESH_S:
            await self.see_destination()
        try:
            return await self.destination.activate(
                self.fence,
                self.migration.id,
                heard_clock_ms=self._heard_clock_ms,
                keep_paused=self.migration.stays_paused,
            )
        except HandoffError:
            self._is_fresh = False
            raise

    async def note(self, change: Callable[[Migration], None]) -> None:
        """Changes the record, and saves it unless it was so before. Raises what Records.save raises."""
        async with self.lock:
            changed = Migration()
            changed.CopyFrom(self.migration)
            change(changed)
            if changed != self.migration:
                before = self.migration
                self.migration = await self.records.save(changed)
                # Of steps that go on meanwhile.
                for warning in before.warnings:
                    self.warn(warning)

    async def need_decision(self, sentence: str) -> None:
        """Tells the operator, in the record, what to decide."""
        if sentence != self.migration.needs_decision:
            self.log.error("a decision is needed", sentence=sentence)
        await self.note(lambda migration: setattr(migration, "needs_decision", sentence))

    def lose(self, host: str, reason: str, *, certain: bool, since: datetime) -> None:
        """Says in the record that the guest does not run at `host`, or may not, for whoever saves it next."""
        self.migration.loss.CopyFrom(GuestLoss(host=host, reason=reason, certain=certain))
        self.migration.loss.time.FromDatetime(since)

    def warn(self, warning: str) -> None:
        """Adds a warning to the record, for whoever saves it next."""
        if warning not in self.migration.warnings:
            self.migration.warnings.append(warning)

    async def insist(
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
                self.log.warning("agent call failed; trying again", error=error.message)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def try_for(
        self, what: str, host: str, patience_s: float, call: Callable[[], Awaitable[Handoff]]
    ) -> Handoff | None:
        """As `insist`, where what can't be done now is done later: None, and a warning in the record."""
        try:
            return await self.insist(call, patience_s, also_refusals=True)
        except StepFailed as failure:
            self.warn(f"{what} on {host} has not been done: {failure}. It is done when the host's agent is back")
            return None


async def _first(watch: AsyncGenerator[Handoff, None], host: str) -> Handoff:
    """How a side is now. Raises what the watch raises, UnavailableError when it ends without a word."""
    async with aclosing(watch) as states:
        async for handoff in states:
            return handoff
    raise UnavailableError(f"agent of {host} ended the watch")
