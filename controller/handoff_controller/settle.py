"""Cleans up what an agent still holds of migrations that ended while it was away."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from handoff.agent.v1.qemu_pb2 import Handoff, HandoffRole, HandoffState
from handoff.agent.v1.types_pb2 import Fence
from handoff.controller.v1.migrations_pb2 import Migration
from handoff_common.errors import HandoffError
from handoff_controller.agents import GrpcAgent
from handoff_controller.machine import State, is_taken_back, state_of
from handoff_controller.store import Reader

log = structlog.get_logger()

SETTLED = frozenset(
    {
        HandoffState.HANDOFF_STATE_RELEASED,
        HandoffState.HANDOFF_STATE_FINALIZED,
        HandoffState.HANDOFF_STATE_ABORTED,
    }
)


class Settler:
    """Ends handoffs whose migration is over. `driven` tells whether a migration still has a driver."""

    def __init__(self, reader: Reader, fence: Fence, driven: Callable[[str], bool]) -> None:
        self._reader = reader
        self._fence = fence
        self._driven = driven
        self.unsettled: dict[str, frozenset[str]] = {}
        """Of each host that was seen whole at the last look, the migrations that its agent has not ended."""
        self._without_record: set[tuple[str, str]] = set()

    def forget(self, host: str) -> None:
        """The host was not seen."""
        self.unsettled.pop(host, None)

    async def settle(self, agent: GrpcAgent) -> list[str]:
        """Settles everything on one agent; what can't be settled now is tried again at the next look.

        Returns what nobody but an operator can settle, in sentences.
        """
        self.forget(agent.name)
        try:
            handoffs = await agent.list_handoffs()
            open_ones = [one for one in handoffs if one.state not in SETTLED]
            left = [one for one in open_ones if not self._driven(one.migration_id)]
        except HandoffError as error:
            log.warning("leftovers not settled", host=agent.name, error=error.message)
            return []
        outcomes = await asyncio.gather(*(self._settle(agent, handoff) for handoff in left), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, HandoffError):
                log.warning("a leftover is not settled", host=agent.name, error=outcome.message)
            elif isinstance(outcome, BaseException):
                raise outcome
        self.unsettled[agent.name] = frozenset(one.migration_id for one in open_ones)
        return [outcome for outcome in outcomes if isinstance(outcome, str) and outcome]

    async def _settle(self, agent: GrpcAgent, handoff: Handoff) -> str:
        migration = await self._reader.find_migration(handoff.migration_id)
        if migration is None:
            if (agent.name, handoff.migration_id) not in self._without_record:
                self._without_record.add((agent.name, handoff.migration_id))
                log.error("a handoff without a record", host=agent.name, migration=handoff.migration_id)
            return _without_record(handoff)
        order = self._order(agent, handoff, migration)
        if order is not None:
            settled = await order()
            log.info(
                "settled a leftover",
                host=agent.name,
                migration=handoff.migration_id,
                state=HandoffState.Name(settled.state),
            )
        return ""

    def _order(
        self, agent: GrpcAgent, handoff: Handoff, migration: Migration
    ) -> Callable[[], Awaitable[Handoff]] | None:
        """What the final state of a migration means for one side of it."""
        migration_id, role, state = handoff.migration_id, handoff.role, state_of(migration)
        if state is State.ABORTED:
            is_fenced = is_taken_back(migration) and role == HandoffRole.HANDOFF_ROLE_DESTINATION
            why = "the migration was aborted"
            return lambda: agent.abort(self._fence, migration_id, role, why, fenced=is_fenced)
        if state is not State.DONE:
            return None
        if role == HandoffRole.HANDOFF_ROLE_SOURCE:
            keep_disks = migration.options.keep_source_disks
            return lambda: agent.release_source(self._fence, migration_id, keep_disks=keep_disks)
        return lambda: agent.finalize_destination(self._fence, migration_id)


def _without_record(handoff: Handoff) -> str:
    """etcd does not know the migration: it was restored from a copy, or emptied. Nothing is done with either copy."""
    state = HandoffState.Name(handoff.state).removeprefix("HANDOFF_STATE_")
    side = "source" if handoff.role == HandoffRole.HANDOFF_ROLE_SOURCE else "destination"
    return (
        f"{handoff.domain_name} ({handoff.domain_uuid}) is the {side} ({state}) of migration {handoff.migration_id}, of"
        " which there is no record: neither is a held source released, nor a destination run, until you decide. Find"
        " the other copy; where neither runs, destroy the destination's and resume the source's with virsh"
    )
