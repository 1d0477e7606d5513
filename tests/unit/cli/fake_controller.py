"""A controller whose answers a test sets; it speaks the real API through the server that the real one uses."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc.aio
from cli_samples import ABORTED, DONE, a_migration

from handoff.agent.v1 import flow_pb2
from handoff.controller.v1 import guests_pb2_grpc, hosts_pb2_grpc, migrations_pb2_grpc
from handoff.controller.v1.guests_pb2 import Guest, ListGuestsRequest, ListGuestsResponse
from handoff.controller.v1.hosts_pb2 import (
    GetNetworkRequest,
    GetNetworkResponse,
    Host,
    ListHostsRequest,
    ListHostsResponse,
)
from handoff.controller.v1.migrations_pb2 import (
    CancelMigrationRequest,
    CancelMigrationResponse,
    CreateMigrationRequest,
    CreateMigrationResponse,
    GetMigrationRequest,
    GetMigrationResponse,
    ListMigrationsRequest,
    ListMigrationsResponse,
    Migration,
    WatchMigrationRequest,
    WatchMigrationResponse,
)
from handoff_common.errors import HandoffError, NotFoundError, PreconditionError
from handoff_common.server import Context, Server


@dataclass
class Fleet:
    """What all fake controllers of a test see, as they would in etcd."""

    hosts: list[Host] = field(default_factory=list)
    guests: list[Guest] = field(default_factory=list)
    networks: dict[str, flow_pb2.GetNetworkResponse] = field(default_factory=dict)
    migrations: dict[str, Migration] = field(default_factory=dict)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def put(self, migration: Migration) -> None:
        async with self.changed:
            self.migrations[migration.id] = migration
            self.changed.notify_all()

    def find(self, beginning: str) -> Migration:
        for migration_id, migration in self.migrations.items():
            if migration_id.startswith(beginning):
                return migration
        raise NotFoundError(f"no migration {beginning!r}; `handoff list` shows them")


class FakeController(
    migrations_pb2_grpc.MigrationsServiceServicer,
    guests_pb2_grpc.GuestsServiceServicer,
    hosts_pb2_grpc.HostsServiceServicer,
):
    """One replica. `start` it; its `address` is on loopback."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.address = ""
        self.calls: list[str] = []
        self.created: list[CreateMigrationRequest] = []
        self.refusals: list[HandoffError] = []
        """Raised by the next calls that change something, in turn."""
        self.drop_answers = 0
        """So many creates do their work and never answer."""
        self.mute = False
        """Watches say nothing more."""
        self.watched = asyncio.Event()
        """Somebody watches."""
        self._server = Server(())

    async def start(self, address: str = "127.0.0.1:0") -> "FakeController":
        server = self._server.grpc_server
        migrations_pb2_grpc.add_MigrationsServiceServicer_to_server(self, server)
        guests_pb2_grpc.add_GuestsServiceServicer_to_server(self, server)
        hosts_pb2_grpc.add_HostsServiceServicer_to_server(self, server)
        port = server.add_insecure_port(address)
        self.address = f"127.0.0.1:{port}" if port > 1 else address
        await self._server.start(())
        return self

    async def stop(self) -> None:
        """At once: calls under way are cut."""
        await self._server.stop(0)

    async def ListHosts(self, request: ListHostsRequest, context: Context) -> ListHostsResponse:  # noqa: N802
        self.calls.append("ListHosts")
        return ListHostsResponse(hosts=self.fleet.hosts)

    async def GetNetwork(self, request: GetNetworkRequest, context: Context) -> GetNetworkResponse:  # noqa: N802
        if request.host not in self.fleet.networks:
            raise PreconditionError("this agent manages no flows")
        return GetNetworkResponse(network=self.fleet.networks[request.host])

    async def ListGuests(self, request: ListGuestsRequest, context: Context) -> ListGuestsResponse:  # noqa: N802
        return ListGuestsResponse(guests=[g for g in self.fleet.guests if request.host in ("", g.owner.host)])

    async def ListMigrations(self, request: ListMigrationsRequest, context: Context) -> ListMigrationsResponse:  # noqa: N802
        return ListMigrationsResponse(migrations=self.fleet.migrations.values())

    async def GetMigration(self, request: GetMigrationRequest, context: Context) -> GetMigrationResponse:  # noqa: N802
        return GetMigrationResponse(migration=self.fleet.find(request.id))

    async def CreateMigration(self, request: CreateMigrationRequest, context: Context) -> CreateMigrationResponse:  # noqa: N802
        self.calls.append("CreateMigration")
        if self.refusals:
            raise self.refusals.pop(0)
        if request.request_id not in self.fleet.migrations:
            self.created.append(request)
            migration = a_migration((1,), id=request.request_id, guest_name=request.guest)
            migration.destination.host = request.destination_host
            await self.fleet.put(migration)
        if self.drop_answers:
            self.drop_answers -= 1
            await asyncio.Event().wait()
        return CreateMigrationResponse(migration=self.fleet.migrations[request.request_id])

    async def CancelMigration(self, request: CancelMigrationRequest, context: Context) -> CancelMigrationResponse:  # noqa: N802
        if self.refusals:
            raise self.refusals.pop(0)
        migration = self.fleet.find(request.id)
        migration.cancel_requested = True
        await self.fleet.put(migration)
        return CancelMigrationResponse(migration=migration)

    async def WatchMigration(  # noqa: N802
        self, request: WatchMigrationRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[WatchMigrationResponse]:
        self.calls.append("WatchMigration")
        self.watched.set()
        told: Migration | None = None
        while True:
            migration = self.fleet.find(request.id)
            if migration != told and not self.mute:
                told = Migration()
                told.CopyFrom(migration)
                yield WatchMigrationResponse(migration=told)
                if migration.state in (DONE, ABORTED):
                    return
                continue
            async with self.fleet.changed:
                await self.fleet.changed.wait()
