"""The controller's API as the command sees it; see failover.py for which of several controllers answers.

A write is safe to repeat: a migration is created under an id of our own choice, and a cancel is a wish.
"""

import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from datetime import datetime
from types import TracebackType
from typing import Self

from handoff.controller.v1.guests_pb2 import ListGuestsRequest, ListGuestsResponse
from handoff.controller.v1.guests_pb2_grpc import GuestsServiceStub
from handoff.controller.v1.hosts_pb2 import GetNetworkRequest, GetNetworkResponse, ListHostsRequest, ListHostsResponse
from handoff.controller.v1.hosts_pb2_grpc import HostsServiceStub
from handoff.controller.v1.migrations_pb2 import (
    CancelMigrationRequest,
    CreateMigrationRequest,
    CreateUpgradeRequest,
    GetMigrationRequest,
    ListMigrationsRequest,
    ListMigrationsResponse,
    Migration,
    MigrationKind,
    RecoverMigrationRequest,
    WatchMigrationRequest,
)
from handoff.controller.v1.migrations_pb2_grpc import MigrationsServiceStub
from handoff_cli.failover import Failover
from handoff_cli.newest import newest
from handoff_cli.rollout_client import RolloutClient
from handoff_cli.states import is_final
from handoff_common.errors import HandoffError, InvalidArgumentError, PreconditionError

# A decision may have to wait for the fence command.
RECOVER_S = 60.0


def new_request_id(now: datetime) -> str:
    """An id for a new migration, of the same form as the controller's own: sorts by creation, can be said aloud."""
    return f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


class Controllers:
    """The fleet's API. An async context manager. All methods raise what Failover's do."""

    def __init__(
        self, addresses: Sequence[str], deadline_s: float, on_trouble: Callable[[str], None] = lambda _: None
    ) -> None:
        self._failover = Failover(addresses, deadline_s, on_trouble)
        self.rollouts = RolloutClient(self._failover)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._failover.close()

    async def hosts(self) -> ListHostsResponse:
        """All hosts."""
        return await self._failover.read(
            lambda channel, s: HostsServiceStub(channel).ListHosts(ListHostsRequest(), timeout=s)
        )

    async def network(self, host: str) -> GetNetworkResponse:
        """The tenants' networks as one host has them."""
        request = GetNetworkRequest(host=host)
        return await self._failover.read(lambda channel, s: HostsServiceStub(channel).GetNetwork(request, timeout=s))

    async def guests(self, host: str = "") -> ListGuestsResponse:
        """The guests, of one host or of all."""
        request = ListGuestsRequest(host=host)
        return await self._failover.read(lambda channel, s: GuestsServiceStub(channel).ListGuests(request, timeout=s))

    async def migrations(self, guest: str = "", *, active_only: bool = False) -> ListMigrationsResponse:
        """The migrations, newest first."""
        request = ListMigrationsRequest(guest=guest, active_only=active_only)
        return await self._failover.read(
            lambda channel, s: MigrationsServiceStub(channel).ListMigrations(request, timeout=s)
        )

    async def migration(self, beginning: str) -> Migration:
        """One migration, by its id or an unambiguous beginning of it."""
        request = GetMigrationRequest(id=beginning)
        response = await self._failover.read(
            lambda channel, s: MigrationsServiceStub(channel).GetMigration(request, timeout=s)
        )
        return response.migration

    async def create(self, request: CreateMigrationRequest) -> Migration:
        """Starts a migration. `request` must carry a request_id; then this may be called again at will.

        Raises PreconditionError when that id belongs to another guest's or host's migration.
        """
        assert request.request_id
        try:
            response = await self._failover.write(
                lambda channel, s: MigrationsServiceStub(channel).CreateMigration(request, timeout=s)
            )
        except PreconditionError:
            # An unanswered try of ours may be what stands in the way.
            created = await self._created(request.request_id)
            if created is None:
                raise
        else:
            created = response.migration
        is_ours = request.guest == created.guest_name or request.guest.lower() == created.guest_uuid
        if not is_ours or request.destination_host != created.destination.host:
            raise PreconditionError(
                f"request id {created.id} belongs to the migration of {created.guest_name} "
                f"to {created.destination.host}; choose another"
            )
        return created

    async def create_upgrade(self, request: CreateUpgradeRequest) -> Migration:
        """Starts an upgrade; as `create`."""
        assert request.request_id
        try:
            response = await self._failover.write(
                lambda channel, s: MigrationsServiceStub(channel).CreateUpgrade(request, timeout=s)
            )
        except (PreconditionError, InvalidArgumentError):
            # An unanswered try of ours may be what stands in the way, or be over already.
            created = await self._created(request.request_id)
            if created is None:
                raise
        else:
            created = response.migration
        is_ours = request.guest == created.guest_name or request.guest.lower() == created.guest_uuid
        if not is_ours or created.kind != MigrationKind.MIGRATION_KIND_UPGRADE:
            raise PreconditionError(
                f"request id {created.id} belongs to another migration, of {created.guest_name}; choose another"
            )
        return created

    async def _created(self, request_id: str) -> Migration | None:
        try:
            found = await self.migration(request_id)
        except HandoffError:
            return None
        return found if found.id == request_id else None

    async def cancel(self, beginning: str) -> Migration:
        """Asks for the abort."""
        request = CancelMigrationRequest(id=beginning)
        response = await self._failover.write(
            lambda channel, s: MigrationsServiceStub(channel).CancelMigration(request, timeout=s)
        )
        return response.migration

    async def recover(self, request: RecoverMigrationRequest) -> Migration:
        """Takes a decision. Safe to repeat: a decision that is taken is answered with the migration."""
        response = await self._failover.write(
            lambda channel, s: MigrationsServiceStub(channel).RecoverMigration(request, timeout=s), try_s=RECOVER_S
        )
        return response.migration

    def watch(self, beginning: str) -> AsyncGenerator[Migration, None]:
        """The migration as it is now, then as it changes, the final state last; never an older one than before."""
        return newest(
            self._failover,
            beginning,
            lambda channel, known: MigrationsServiceStub(channel).WatchMigration(WatchMigrationRequest(id=known)),
            lambda response: response.migration,
            is_final,
        )
