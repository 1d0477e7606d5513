"""Cleans up what an agent still holds of migrations that ended while it was away."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from handoff.agent.v1.qemu_pb2 import Handoff, HandoffRole, HandoffState
from handoff.agent.v1.types_pb2 import Fence
from handoff.controller.v1.migrations_pb2 import Migration
from handoff_common.errors import HandoffError
from handoff_controller.agents import GrpcAgent
from handoff_controller.machine import State, state_of
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

    async def settle(self, agent: GrpcAgent) -> None:
        """Settles everything on one agent; what can't be settled now is tried again at the next look."""
        try:
            handoffs = await agent.list_handoffs()
            left = [one for one in handoffs if one.state not in SETTLED and not self._driven(one.migration_id)]
            await asyncio.gather(*(self._settle(agent, handoff) for handoff in left))
        except HandoffError as error:
            log.warning("leftovers not settled", host=agent.name, error=error.message)

    async def _settle(self, agent: GrpcAgent, handoff: Handoff) -> None:
        migration = await self._reader.find_migration(handoff.migration_id)
        if migration is None:
            log.error("a handoff without a record", host=agent.name, migration=handoff.migration_id)
            return
        order = self._order(agent, handoff, migration)
        if order is not None:
            settled = await order()
            log.info(
                "settled a leftover",
                host=agent.name,
                migration=handoff.migration_id,
                state=HandoffState.Name(settled.state),
            )

    def _order(self, agent: GrpcAgent, handoff: Handoff, migration: Migration) -> Callable[[], Awaitable[Handoff]] | None:
        """What the final state of a migration means for one side of it."""
        state, migration_id, role = state_of(migration), handoff.migration_id, handoff.role
        if state is State.ABORTED:
            return lambda: agent.abort(self._fence, migration_id, role, "the migration was aborted")
        if state is not State.DONE:
            return None
        if role == HandoffRole.HANDOFF_ROLE_SOURCE:
            keep_disks = migration.options.keep_source_disks
            return lambda: agent.release_source(self._fence, migration_id, keep_disks=keep_disks)
        return lambda: agent.finalize_destination(self._fence, migration_id)
