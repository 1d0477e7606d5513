"""The controller's RPCs. Every replica reads from etcd; what changes something is done by the leader.

client -> follower -> leader       a write, forwarded once, with the client's deadline
client -> any replica -> etcd      a read or a watch
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import grpc.aio

from handoff.controller.v1 import guests_pb2_grpc, hosts_pb2_grpc, migrations_pb2_grpc
from handoff.controller.v1.guests_pb2 import (
    GetGuestRequest,
    GetGuestResponse,
    Guest,
    ListGuestsRequest,
    ListGuestsResponse,
)
from handoff.controller.v1.hosts_pb2 import (
    GetHostRequest,
    GetHostResponse,
    GetNetworkRequest,
    GetNetworkResponse,
    Host,
    HostState,
    ListHostsRequest,
    ListHostsResponse,
)
from handoff.controller.v1.migrations_pb2 import (
    CancelMigrationRequest,
    CancelMigrationResponse,
    CreateMigrationRequest,
    CreateMigrationResponse,
    CreateUpgradeRequest,
    CreateUpgradeResponse,
    GetMigrationRequest,
    GetMigrationResponse,
    GuestLoss,
    ListMigrationsRequest,
    ListMigrationsResponse,
    RecoverMigrationRequest,
    RecoverMigrationResponse,
    WatchMigrationRequest,
    WatchMigrationResponse,
)
from handoff.controller.v1.migrations_pb2_grpc import MigrationsServiceStub
from handoff_common.channel import open_channel
from handoff_common.errors import HostDownError, NotFoundError, UnavailableError, from_rpc_error
from handoff_controller.agents import Agents
from handoff_controller.conductor import Conductor
from handoff_controller.etcd.client import EtcdClient
from handoff_controller.etcd.election import current_leader
from handoff_controller.machine import FINAL, state_of
from handoff_controller.store import Reader

if TYPE_CHECKING:
    from handoff.controller.v1.migrations_pb2_grpc import MigrationsServiceAsyncStub

Metadata: TypeAlias = tuple[tuple[str, str], ...]
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Response = TypeVar("Response")

FORWARDED = "handoff-forwarded-by"
# For a client that set no deadline of its own.
FORWARD_DEADLINE_S = 30.0


class LeaderLink:
    """Finds the leader: ourselves, or another replica's API."""

    def __init__(self, client: EtcdClient, name: str) -> None:
        self.conductor: Conductor | None = None
        """Set while this replica leads."""
        self._client = client
        self._name = name
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def close(self) -> None:
        """Closes the channels to other replicas."""
        for channel in self._channels.values():
            await channel.close()

    def leading(self) -> Conductor | None:
        """Our conductor, if we lead for sure."""
        if self.conductor is not None and self.conductor.leadership.valid():
            return self.conductor
        return None

    async def forward(
        self, context: Context, call: Callable[["MigrationsServiceAsyncStub", float, Metadata], Awaitable[Response]]
    ) -> Response:
        """As forward_through, for what is about migrations."""
        return await self.forward_through(
            context, lambda channel, timeout_s, via: call(MigrationsServiceStub(channel), timeout_s, via)
        )

    async def forward_through(
        self, context: Context, call: Callable[[grpc.aio.Channel, float, Metadata], Awaitable[Response]]
    ) -> Response:
        """Has the leader answer. Raises UnavailableError when there is none, or it is not who it was."""
        leader = await current_leader(self._client)
        forwarded = dict(context.invocation_metadata() or ()).get(FORWARDED)
        if leader is None or leader.name == self._name or forwarded:
            raise UnavailableError("no controller leads at the moment; try again in a few seconds")
        channel = self._channels.get(leader.address)
        if channel is None:
            channel = self._channels[leader.address] = open_channel(leader.address)
        remaining = context.time_remaining()
        timeout_s = FORWARD_DEADLINE_S if remaining is None else remaining
        try:
            return await call(channel, timeout_s, ((FORWARDED, self._name),))
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, f"leader {leader.name} ({leader.address})") from error


class MigrationsService(migrations_pb2_grpc.MigrationsServiceServicer):
    """Migrations: see migrations.proto."""

    def __init__(self, reader: Reader, link: LeaderLink) -> None:
        self._reader = reader
        self._link = link

    async def CreateMigration(self, request: CreateMigrationRequest, context: Context) -> CreateMigrationResponse:  # noqa: N802
        """Leader only."""
        if (conductor := self._link.leading()) is not None:
            return CreateMigrationResponse(migration=await conductor.create(request))
        return await self._link.forward(
            context,
            lambda leader, timeout, via: leader.CreateMigration(request, timeout=timeout, metadata=via),
        )

    async def CreateUpgrade(self, request: CreateUpgradeRequest, context: Context) -> CreateUpgradeResponse:  # noqa: N802
        """Leader only."""
        if (conductor := self._link.leading()) is not None:
            return CreateUpgradeResponse(migration=await conductor.create(request))
        return await self._link.forward(
            context,
            lambda leader, timeout, via: leader.CreateUpgrade(request, timeout=timeout, metadata=via),
        )

    async def CancelMigration(self, request: CancelMigrationRequest, context: Context) -> CancelMigrationResponse:  # noqa: N802
        """Leader only."""
        if (conductor := self._link.leading()) is not None:
            return CancelMigrationResponse(migration=await conductor.cancel(request.id))
        return await self._link.forward(
            context,
            lambda leader, timeout, via: leader.CancelMigration(request, timeout=timeout, metadata=via),
        )

    async def RecoverMigration(self, request: RecoverMigrationRequest, context: Context) -> RecoverMigrationResponse:  # noqa: N802
        """Leader only."""
        if (conductor := self._link.leading()) is not None:
            return RecoverMigrationResponse(migration=await conductor.recover(request))
        return await self._link.forward(
            context,
            lambda leader, timeout, via: leader.RecoverMigration(request, timeout=timeout, metadata=via),
        )

    async def GetMigration(self, request: GetMigrationRequest, context: Context) -> GetMigrationResponse:  # noqa: N802
        """Any replica."""
        return GetMigrationResponse(migration=await self._reader.migration(request.id))

    async def ListMigrations(self, request: ListMigrationsRequest, context: Context) -> ListMigrationsResponse:  # noqa: N802
        """Any replica."""
        found = [
            migration
            for migration in await self._reader.migrations()
            if (not request.guest or request.guest in (migration.guest_name, migration.guest_uuid))
            and not (request.active_only and state_of(migration) in FINAL)
        ]
        found.sort(key=lambda migration: migration.create_time.ToNanoseconds(), reverse=True)
        return ListMigrationsResponse(migrations=found)

    async def WatchMigration(  # noqa: N802
        self, request: WatchMigrationRequest, context: Context
    ) -> AsyncIterator[WatchMigrationResponse]:
        """Any replica."""
        async for migration in self._reader.watch_migration(request.id):
            yield WatchMigrationResponse(migration=migration)


class GuestsService(guests_pb2_grpc.GuestsServiceServicer):
    """Guests: see guests.proto."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    async def GetGuest(self, request: GetGuestRequest, context: Context) -> GetGuestResponse:  # noqa: N802
        """Any replica."""
        guest = await self._reader.guest(request.guest)
        return GetGuestResponse(guest=(await self._described([guest]))[0])

    async def ListGuests(self, request: ListGuestsRequest, context: Context) -> ListGuestsResponse:  # noqa: N802
        """Any replica."""
        guests = [guest for guest in await self._reader.guests() if request.host in ("", guest.owner.host)]
        return ListGuestsResponse(guests=await self._described(guests))

    async def _described(self, guests: list[Guest]) -> list[Guest]:
        described = _with_domains(guests, await self._reader.hosts())
        for guest in described:
            if guest.active_migration:
                migration = await self._reader.find_migration(guest.active_migration)
                guest.needs_decision = migration.needs_decision if migration is not None else ""
        return described


class HostsService(hosts_pb2_grpc.HostsServiceServicer):
    """Hosts: see hosts.proto."""

    def __init__(self, reader: Reader, addresses: dict[str, str], agents: Agents) -> None:
        """`addresses`: the configured hosts; those that no leader has looked at yet are listed too."""
        self._reader = reader
        self._addresses = addresses
        self._agents = agents

    async def GetHost(self, request: GetHostRequest, context: Context) -> GetHostResponse:  # noqa: N802
        """Any replica."""
        for host in await self._all():
            if host.name == request.name:
                return GetHostResponse(host=host)
        raise NotFoundError(
            f"no host {request.name!r}: the controller's configuration knows {', '.join(self._addresses)}"
        )

    async def ListHosts(self, request: ListHostsRequest, context: Context) -> ListHostsResponse:  # noqa: N802
        """Any replica."""
        return ListHostsResponse(hosts=await self._all())

    async def GetNetwork(self, request: GetNetworkRequest, context: Context) -> GetNetworkResponse:  # noqa: N802
        """Any replica."""
        try:
            return GetNetworkResponse(network=await self._agents[request.host].get_network())
        except UnavailableError as error:
            raise HostDownError(error.message) from error

    async def _all(self) -> list[Host]:
        recorded = {host.name: host for host in await self._reader.hosts()}
        unseen = HostState.HOST_STATE_UNSPECIFIED
        return [
            recorded.get(name) or Host(name=name, agent_address=address, state=unseen, message="not looked at yet")
            for name, address in sorted(self._addresses.items())
        ]


def _with_domains(guests: list[Guest], hosts: tuple[Host, ...]) -> list[Guest]:
    """The guests with their domains as their owners last reported them; where one can't be asked, that it is so."""
    domains = {(host.name, domain.uuid): domain for host in hosts for domain in host.domains}
    down = {host.name: host for host in hosts if host.state == HostState.HOST_STATE_DOWN}
    for guest in guests:
        silent = down.get(guest.owner.host)
        if silent is not None and not guest.HasField("loss"):
            guest.loss.CopyFrom(GuestLoss(host=silent.name, time=silent.seen_time, reason=silent.message))
        domain = domains.get((guest.owner.host, guest.uuid))
        if domain is not None:
            guest.domain.CopyFrom(domain)
    return guests
