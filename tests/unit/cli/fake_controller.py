"""A controller whose answers a test sets; it speaks the real API through the server that the real one uses."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc.aio
from cli_samples import ABORTED, DONE, ROLLOUT_RUNNING, ROLLOUT_STOPPING, a_migration, a_rollout

from handoff.agent.v1 import flow_pb2
from handoff.controller.v1 import guests_pb2_grpc, hosts_pb2_grpc, migrations_pb2_grpc, rollouts_pb2_grpc
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
    RecoverMigrationRequest,
    RecoverMigrationResponse,
    WatchMigrationRequest,
    WatchMigrationResponse,
)
from handoff.controller.v1.rollouts_pb2 import (
    CancelRolloutRequest,
    CancelRolloutResponse,
    CreateRolloutRequest,
    CreateRolloutResponse,
    GetRolloutRequest,
    GetRolloutResponse,
    ListRolloutsRequest,
    ListRolloutsResponse,
    Rollout,
    WatchRolloutRequest,
    WatchRolloutResponse,
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
    rollouts: dict[str, Rollout] = field(default_factory=dict)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def put(self, migration: Migration) -> None:
        async with self.changed:
            self.migrations[migration.id] = migration
            self.changed.notify_all()

    async def put_rollout(self, rollout: Rollout) -> None:
        async with self.changed:
            self.rollouts[rollout.id] = rollout
            self.changed.notify_all()

    def find_rollout(self, beginning: str) -> Rollout:
        for rollout_id, rollout in self.rollouts.items():
            if rollout_id.startswith(beginning):
                return rollout
        raise NotFoundError(f"no rollout {beginning!r}; `handoff rollouts` shows them")

    def find(self, beginning: str) -> Migration:
        for migration_id, migration in self.migrations.items():
            if migration_id.startswith(beginning):
                return migration
        raise NotFoundError(f"no migration {beginning!r}; `handoff list` shows them")


class FakeController(
    migrations_pb2_grpc.MigrationsServiceServicer,
    guests_pb2_grpc.GuestsServiceServicer,
    hosts_pb2_grpc.HostsServiceServicer,
    rollouts_pb2_grpc.RolloutsServiceServicer,
):
    """One replica. `start` it; its `address` is on loopback."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.address = ""
        self.calls: list[str] = []
        self.created: list[CreateMigrationRequest] = []
        self.created_rollouts: list[CreateRolloutRequest] = []
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
        rollouts_pb2_grpc.add_RolloutsServiceServicer_to_server(self, server)
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

    async def RecoverMigration(self, request: RecoverMigrationRequest, context: Context) -> RecoverMigrationResponse:  # noqa: N802
        if self.refusals:
            raise self.refusals.pop(0)
        migration = self.fleet.find(request.id)
        migration.recovery.target = request.target
        migration.recovery.by = request.by
        migration.recovery.fenced_host = request.fenced_host
        await self.fleet.put(migration)
        return RecoverMigrationResponse(migration=migration)

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

    async def ListRollouts(self, request: ListRolloutsRequest, context: Context) -> ListRolloutsResponse:  # noqa: N802
        found = [
            rollout
            for rollout in self.fleet.rollouts.values()
            if request.host in ("", rollout.host)
            and not (request.active_only and rollout.state not in (ROLLOUT_RUNNING, ROLLOUT_STOPPING))
        ]
        return ListRolloutsResponse(rollouts=found)

    async def GetRollout(self, request: GetRolloutRequest, context: Context) -> GetRolloutResponse:  # noqa: N802
        return GetRolloutResponse(rollout=self.fleet.find_rollout(request.id))

    async def CreateRollout(self, request: CreateRolloutRequest, context: Context) -> CreateRolloutResponse:  # noqa: N802
        self.calls.append("CreateRollout")
        if self.refusals:
            raise self.refusals.pop(0)
        if request.request_id not in self.fleet.rollouts:
            self.created_rollouts.append(request)
            await self.fleet.put_rollout(a_rollout(id=request.request_id, host=request.host))
        if self.drop_answers:
            self.drop_answers -= 1
            await asyncio.Event().wait()
        return CreateRolloutResponse(rollout=self.fleet.rollouts[request.request_id])

    async def CancelRollout(self, request: CancelRolloutRequest, context: Context) -> CancelRolloutResponse:  # noqa: N802
        if self.refusals:
            raise self.refusals.pop(0)
        rollout = self.fleet.find_rollout(request.id)
        rollout.cancel_requested = True
        await self.fleet.put_rollout(rollout)
        return CancelRolloutResponse(rollout=rollout)

    async def WatchRollout(  # noqa: N802
        self, request: WatchRolloutRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[WatchRolloutResponse]:
        self.watched.set()
        told: Rollout | None = None
        while True:
            rollout = self.fleet.find_rollout(request.id)
            if rollout != told:
                told = Rollout()
                told.CopyFrom(rollout)
                yield WatchRolloutResponse(rollout=told)
                if rollout.state not in (ROLLOUT_RUNNING, ROLLOUT_STOPPING):
                    return
                continue
            async with self.fleet.changed:
                await self.fleet.changed.wait()
