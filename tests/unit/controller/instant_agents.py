"""Agents that do everything at once, but copy no memory before the test lets them."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from handoff.agent.v1.host_pb2 import Host, Slot, WatchEventsResponse
from handoff.agent.v1.qemu_pb2 import Handoff, HandoffRole, HandoffState, SourceGuest, TransferLimits, TransferMethod
from handoff.agent.v1.types_pb2 import Domain, Fence
from handoff_common.errors import NotFoundError


class InstantAgent:
    """As agents.GrpcAgent."""

    def __init__(self, name: str, domains: Sequence[Domain] = ()) -> None:
        self.name = name
        self.address = f"{name}:7701"
        self.calls: list[tuple[str, str]] = []
        self.may_copy = asyncio.Event()
        self._domains = {domain.uuid: domain for domain in domains}
        self._moving: dict[str, Domain] = {}
        self._states: dict[str, HandoffState.ValueType] = {}
        self._changed = asyncio.Condition()

    async def get_host(self) -> Host:
        return Host(name=self.name, slots=[Slot(name="a", connected=True)])

    async def list_domains(self) -> tuple[Domain, ...]:
        return tuple(self._domains.values())

    async def list_handoffs(self) -> tuple[Handoff, ...]:
        return ()

    async def watch_events(self) -> AsyncGenerator[WatchEventsResponse, None]:
        await asyncio.Event().wait()
        yield WatchEventsResponse()

    async def prepare_source(
        self, fence: Fence, migration_id: str, domain_uuid: str, *, validate_only: bool = False, local: bool = False
    ) -> SourceGuest:
        if domain_uuid not in self._domains:
            raise NotFoundError(f"no {domain_uuid} on {self.name}")
        if not validate_only:
            self._moving[migration_id] = self._domains[domain_uuid]
            await self._do("prepare_source", migration_id, HandoffState.HANDOFF_STATE_PREPARED)
        return SourceGuest(domain=self._domains[domain_uuid])

    async def prepare_destination(
        self,
        fence: Fence,
        migration_id: str,
        guest: SourceGuest,
        slot: str,
        *,
        validate_only: bool = False,
        method: TransferMethod.ValueType = TransferMethod.TRANSFER_METHOD_TCP,
        emulator: str = "",
        fast: bool = False,
    ) -> Handoff:
        if validate_only:
            return Handoff()
        self._moving[migration_id] = guest.domain
        handoff = await self._do("prepare_destination", migration_id, HandoffState.HANDOFF_STATE_PREPARED)
        handoff.listen_uri = f"tcp:{self.name}:49152"
        return handoff

    async def start_transfer(
        self, fence: Fence, migration_id: str, uri: str, limits: TransferLimits, disks: object = ()
    ) -> Handoff:
        return await self._do("start_transfer", migration_id, HandoffState.HANDOFF_STATE_TRANSFERRING)

    async def switch_over(self, fence: Fence, migration_id: str) -> Handoff:
        return await self._do("switch_over", migration_id, HandoffState.HANDOFF_STATE_HELD)

    async def activate(self, fence: Fence, migration_id: str) -> Handoff:
        return await self._do("activate", migration_id, HandoffState.HANDOFF_STATE_ACTIVE)

    async def release_source(self, fence: Fence, migration_id: str, *, keep_disks: bool = False) -> Handoff:
        self._domains.pop(self._moving[migration_id].uuid, None)
        return await self._do("release_source", migration_id, HandoffState.HANDOFF_STATE_RELEASED)

    async def finalize_destination(self, fence: Fence, migration_id: str) -> Handoff:
        moved = self._moving[migration_id]
        self._domains[moved.uuid] = moved
        return await self._do("finalize_destination", migration_id, HandoffState.HANDOFF_STATE_FINALIZED)

    async def abort(self, fence: Fence, migration_id: str, role: "HandoffRole.ValueType", reason: str) -> Handoff:
        return await self._do("abort", migration_id, HandoffState.HANDOFF_STATE_ABORTED)

    async def watch(self, migration_id: str, role: "HandoffRole.ValueType") -> AsyncGenerator[Handoff, None]:
        while True:
            if self._states[migration_id] == HandoffState.HANDOFF_STATE_TRANSFERRING and self.may_copy.is_set():
                self._states[migration_id] = HandoffState.HANDOFF_STATE_READY
            yield self._handoff(migration_id)
            if self._states[migration_id] == HandoffState.HANDOFF_STATE_TRANSFERRING:
                await self.may_copy.wait()
            else:
                async with self._changed:
                    await self._changed.wait()

    async def _do(self, call: str, migration_id: str, state: "HandoffState.ValueType") -> Handoff:
        self.calls.append((call, migration_id))
        self._states[migration_id] = state
        async with self._changed:
            self._changed.notify_all()
        return self._handoff(migration_id)

    def _handoff(self, migration_id: str) -> Handoff:
        return Handoff(migration_id=migration_id, state=self._states[migration_id])


class InstantAgents:
    """As agents.Agents."""

    def __init__(self, agents: Sequence[InstantAgent]) -> None:
        self._agents = {agent.name: agent for agent in agents}

    def __getitem__(self, host: str) -> InstantAgent:
        if host not in self._agents:
            raise NotFoundError(f"no host {host!r}")
        return self._agents[host]

    def __contains__(self, host: object) -> bool:
        return host in self._agents

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._agents))
