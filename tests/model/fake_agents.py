"""The hosts' agents, and the storage, as the controllers reach them: over the network."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from fake_guest import Guest
from fake_hosts import FakeHost
from fake_network import Network

from handoff.agent.v1 import qemu_pb2 as pb
from handoff.agent.v1.host_pb2 import Host, WatchEventsResponse
from handoff.agent.v1.types_pb2 import Domain, Fence
from handoff.storage.v1.access_pb2 import Volume
from handoff_agent.rules import Role
from handoff_common.errors import NotFoundError, PreconditionError, UnavailableError

STORAGE = "storage"


class FakeAgent:
    """As agents.GrpcAgent."""

    def __init__(self, host: FakeHost, network: Network) -> None:
        self.name = host.name
        self.address = f"{host.name}:7701"
        self._host = host
        self._network = network

    async def get_host(self) -> Host:
        await self._network.ask(self.name)
        return self._host.get_host()

    async def list_domains(self) -> tuple[Domain, ...]:
        await self._network.ask(self.name)
        return self._host.list_domains()

    async def list_handoffs(self) -> tuple[pb.Handoff, ...]:
        await self._network.ask(self.name)
        return self._host.list_handoffs()

    async def watch_events(self) -> AsyncGenerator[WatchEventsResponse, None]:
        await asyncio.Event().wait()
        yield WatchEventsResponse()

    async def watch(self, migration_id: str, role: Role) -> AsyncGenerator[pb.Handoff, None]:
        await self._network.open(self.name)
        async for handoff in self._host.watch(migration_id, role):
            if self._network.is_cut(self.name):
                raise UnavailableError(f"{self.name} is cut off")
            yield handoff

    async def prepare_source(
        self,
        fence: Fence,
        migration_id: str,
        domain_uuid: str,
        *,
        validate_only: bool = False,
        local: bool = False,
        disks: object = (),
    ) -> pb.SourceGuest:
        if validate_only:
            await self._network.ask(self.name)
            return await self._host.validate_source()
        return await self._network.order(self.name, lambda: self._host.prepare_source(fence, migration_id))

    async def prepare_destination(
        self,
        fence: Fence,
        migration_id: str,
        guest: pb.SourceGuest,
        slot: str,
        *,
        validate_only: bool = False,
        method: pb.TransferMethod.ValueType = pb.TRANSFER_METHOD_TCP,
        emulator: str = "",
        fast: bool = False,
        bandwidth_bytes_per_s: int = 0,
    ) -> pb.Handoff:
        if validate_only:
            await self._network.ask(self.name)
            return await self._host.validate_destination(fast=fast)
        return await self._network.order(
            self.name, lambda: self._host.prepare_destination(fence, migration_id, fast=fast)
        )

    async def start_transfer(
        self,
        fence: Fence,
        migration_id: str,
        uri: str,
        limits: pb.TransferLimits,
        disks: object = (),
        tunnel_address: str = "",
    ) -> pb.Handoff:
        return await self._network.order(self.name, lambda: self._host.start_transfer(fence, migration_id, uri))

    async def switch_over(self, fence: Fence, migration_id: str) -> pb.Handoff:
        return await self._network.order(self.name, lambda: self._host.switch_over(fence, migration_id))

    async def activate(
        self, fence: Fence, migration_id: str, *, heard_clock_ms: int, keep_paused: bool = False
    ) -> pb.Handoff:
        return await self._network.order(self.name, lambda: self._host.activate(fence, migration_id, heard_clock_ms))

    async def release_source(self, fence: Fence, migration_id: str, *, keep_disks: bool = False) -> pb.Handoff:
        return await self._network.order(
            self.name, lambda: self._host.release_source(fence, migration_id, keep_disks=keep_disks)
        )

    async def finalize_destination(self, fence: Fence, migration_id: str) -> pb.Handoff:
        return await self._network.order(self.name, lambda: self._host.finalize_destination(fence, migration_id))

    async def abort(
        self, fence: Fence, migration_id: str, role: Role, reason: str, *, fenced: bool = False
    ) -> pb.Handoff:
        return await self._network.order(
            self.name, lambda: self._host.abort(fence, migration_id, role, reason, fenced=fenced)
        )


class FakeAgents:
    """As agents.Agents."""

    def __init__(self, agents: Sequence[FakeAgent]) -> None:
        self._agents = {agent.name: agent for agent in agents}

    def __getitem__(self, host: str) -> FakeAgent:
        if host not in self._agents:
            raise NotFoundError(f"no host {host!r}")
        return self._agents[host]

    def __contains__(self, host: object) -> bool:
        return host in self._agents

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._agents))


class FakeVolumes:
    """As volumes.Volumes: the access list of the guest's one network volume."""

    def __init__(self, guest: Guest, network: Network, *, forgets: bool) -> None:
        """`forgets`: a seeded bug, it takes requests in the order in which they arrive."""
        self._forgets = forgets
        self._guest = guest
        self._network = network

    async def grant(self, volume: Volume, host: str, revision: int) -> None:
        async def grant() -> None:
            self._note(host, revision)
            self._guest.admitted.add(host)

        await self._network.order(STORAGE, grant)

    async def revoke(self, volume: Volume, host: str, revision: int) -> None:
        async def revoke() -> None:
            self._note(host, revision)
            self._guest.shut_out(host)

        await self._network.order(STORAGE, revoke)

    async def close(self) -> None:
        """Nothing is held."""

    def _note(self, host: str, revision: int) -> None:
        latest = self._guest.revisions.get(host, 0)
        if revision < latest and not self._forgets:
            raise PreconditionError(f"revision {revision} comes after {latest}")
        self._guest.revisions[host] = max(revision, latest)
