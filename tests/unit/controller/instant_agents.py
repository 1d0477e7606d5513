"""Agents that do everything at once, but copy no memory before the test lets them."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from handoff.agent.v1.disk_pb2 import DiskStrategy
from handoff.agent.v1.host_pb2 import Host, Slot, WatchEventsResponse
from handoff.agent.v1.qemu_pb2 import Handoff, HandoffRole, HandoffState, SourceGuest, TransferLimits, TransferMethod
from handoff.agent.v1.types_pb2 import Domain, Fence
from handoff_common.errors import NotFoundError, UnavailableError

SOURCE = HandoffRole.HANDOFF_ROLE_SOURCE
DESTINATION = HandoffRole.HANDOFF_ROLE_DESTINATION


class InstantAgent:
    """As agents.GrpcAgent."""

    def __init__(self, name: str, domains: Sequence[Domain] = ()) -> None:
        self.name = name
        self.address = f"{name}:7701"
        self.calls: list[tuple[str, str]] = []
        self.may_copy = asyncio.Event()
        self.away: set[str] = set()
        """Calls that are not answered; "all" stands for every one."""
        self.away_from_activate: set[str] = set()
        """The same, from the moment that it is told to run the guest."""
        self.ends_as_resumed = False
        """A guest that it is told to run ends, and may have run."""
        self.pulls = False
        """It still pulls a disk of each guest that came."""
        self.handoffs: list[Handoff] = []
        """What it lists; by default nothing is left."""
        self._domains = {domain.uuid: domain for domain in domains}
        self._moving: dict[str, Domain] = {}
        self._states: dict[tuple[str, HandoffRole.ValueType], HandoffState.ValueType] = {}
        self._messages: dict[str, str] = {}
        self._changed = asyncio.Condition()

    def _must_be_there(self, call: str) -> None:
        if self.away & {call, "all"}:
            raise UnavailableError(f"{self.name} can't be reached")

    async def get_host(self) -> Host:
        self._must_be_there("get_host")
        return Host(name=self.name, slots=[Slot(name="a", connected=True)])

    async def list_domains(self) -> tuple[Domain, ...]:
        return tuple(self._domains.values())

    async def list_handoffs(self) -> tuple[Handoff, ...]:
        return tuple(self.handoffs)

    async def watch_events(self) -> AsyncGenerator[WatchEventsResponse, None]:
        await asyncio.Event().wait()
        yield WatchEventsResponse()

    async def prepare_source(
        self,
        fence: Fence,
        migration_id: str,
        domain_uuid: str,
        *,
        validate_only: bool = False,
        local: bool = False,
        disks: object = (),
    ) -> SourceGuest:
        if domain_uuid not in self._domains:
            raise NotFoundError(f"no {domain_uuid} on {self.name}")
        if not validate_only:
            self._moving[migration_id] = self._domains[domain_uuid]
            await self._do("prepare_source", migration_id, SOURCE, HandoffState.HANDOFF_STATE_PREPARED)
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
        bandwidth_bytes_per_s: int = 0,
    ) -> Handoff:
        if validate_only:
            return Handoff()
        self._moving[migration_id] = guest.domain
        handoff = await self._do("prepare_destination", migration_id, DESTINATION, HandoffState.HANDOFF_STATE_PREPARED)
        handoff.listen_uri = f"tcp:{self.name}:49152"
        if self.pulls:
            handoff.disks.add(target="vda", strategy=DiskStrategy.DISK_STRATEGY_PULL, base_uri="nbd://h1:1/vda")
        return handoff

    async def start_transfer(
        self,
        fence: Fence,
        migration_id: str,
        uri: str,
        limits: TransferLimits,
        disks: object = (),
        tunnel_address: str = "",
    ) -> Handoff:
        return await self._do("start_transfer", migration_id, SOURCE, HandoffState.HANDOFF_STATE_TRANSFERRING)

    async def switch_over(self, fence: Fence, migration_id: str) -> Handoff:
        return await self._do("switch_over", migration_id, SOURCE, HandoffState.HANDOFF_STATE_HELD)

    async def activate(
        self, fence: Fence, migration_id: str, *, heard_clock_ms: int, keep_paused: bool = False
    ) -> Handoff:
        self.away |= self.away_from_activate
        if self.ends_as_resumed:
            handoff = await self._do("activate", migration_id, DESTINATION, HandoffState.HANDOFF_STATE_FAILED)
            handoff.message = "its QEMU ended as it was told to run"
            return handoff
        return await self._do("activate", migration_id, DESTINATION, HandoffState.HANDOFF_STATE_ACTIVE)

    async def release_source(self, fence: Fence, migration_id: str, *, keep_disks: bool = False) -> Handoff:
        self._domains.pop(self._moving[migration_id].uuid, None)
        return await self._do("release_source", migration_id, SOURCE, HandoffState.HANDOFF_STATE_RELEASED)

    async def finalize_destination(self, fence: Fence, migration_id: str) -> Handoff:
        moved = self._moving[migration_id]
        self._domains[moved.uuid] = moved
        handoff = await self._do(
            "finalize_destination", migration_id, DESTINATION, HandoffState.HANDOFF_STATE_FINALIZED
        )
        handoff.ended = self.ends_as_resumed
        return handoff

    async def abort(
        self, fence: Fence, migration_id: str, role: "HandoffRole.ValueType", reason: str, *, fenced: bool = False
    ) -> Handoff:
        return await self._do("fence" if fenced else "abort", migration_id, role, HandoffState.HANDOFF_STATE_ABORTED)

    async def watch(self, migration_id: str, role: "HandoffRole.ValueType") -> AsyncGenerator[Handoff, None]:
        key = migration_id, role
        while True:
            self._must_be_there("watch")
            if self._states[key] == HandoffState.HANDOFF_STATE_TRANSFERRING and self.may_copy.is_set():
                self._states[key] = HandoffState.HANDOFF_STATE_READY
            yield self._handoff(migration_id, role)
            if self._states[key] == HandoffState.HANDOFF_STATE_TRANSFERRING:
                await self.may_copy.wait()
            else:
                async with self._changed:
                    await self._changed.wait()

    def start(self, domain: Domain) -> None:
        """Another guest runs here."""
        self._domains[domain.uuid] = domain

    async def has_pulled(self) -> None:
        """All of every disk is here."""
        self.pulls = False
        async with self._changed:
            self._changed.notify_all()

    async def fail(self, migration_id: str, message: str) -> None:
        """Its side of a migration goes wrong by itself."""
        self._messages[migration_id] = message
        for role in (SOURCE, DESTINATION):
            if (migration_id, role) in self._states:
                await self._do("", migration_id, role, HandoffState.HANDOFF_STATE_FAILED)

    async def _do(
        self, call: str, migration_id: str, role: "HandoffRole.ValueType", state: "HandoffState.ValueType"
    ) -> Handoff:
        self._must_be_there(call)
        self.calls.append((call, migration_id))
        self._states[migration_id, role] = state
        async with self._changed:
            self._changed.notify_all()
        return self._handoff(migration_id, role)

    def _handoff(self, migration_id: str, role: "HandoffRole.ValueType") -> Handoff:
        return Handoff(
            migration_id=migration_id,
            role=role,
            state=self._states[migration_id, role],
            was_running=True,
            message=self._messages.get(migration_id, ""),
            pulling=self.pulls,
        )


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
