"""The controller as the benchmarks use it: a move or an upgrade to its end, and quiet before the next."""

import asyncio
from collections.abc import Callable

import click
import grpc
import grpc.aio

from handoff.controller.v1.guests_pb2 import GetGuestRequest, Guest
from handoff.controller.v1.guests_pb2_grpc import GuestsServiceStub
from handoff.controller.v1.migrations_pb2 import (
    CreateMigrationRequest,
    CreateUpgradeRequest,
    Migration,
    WatchMigrationRequest,
)
from handoff.controller.v1.migrations_pb2_grpc import MigrationsServiceStub
from handoff_controller.machine import FINAL, State, state_of

CALL_S = 5.0
POLL_S = 0.1


class Client:
    """One controller. Everything that does not end well raises ClickException or TimeoutError."""

    def __init__(self, channel: grpc.aio.Channel, deadline_s: float) -> None:
        """`deadline_s`: the longest that a move may take."""
        self._guests, self._migrations = GuestsServiceStub(channel), MigrationsServiceStub(channel)
        self._deadline_s = deadline_s

    async def create_move(self, guest: str, host: str) -> Migration:
        """Begins a move."""
        request = CreateMigrationRequest(guest=guest, destination_host=host)
        return (await self._migrations.CreateMigration(request, timeout=self._deadline_s)).migration

    async def create_upgrade(self, guest: str, release: str) -> Migration:
        """Begins an upgrade."""
        request = CreateUpgradeRequest(guest=guest, release=release)
        return (await self._migrations.CreateUpgrade(request, timeout=self._deadline_s)).migration

    async def done(self, migration: Migration) -> Migration:
        """The record at its end, as soon as a client can know it."""
        call = self._migrations.WatchMigration(WatchMigrationRequest(id=migration.id), timeout=self._deadline_s)
        try:
            async for update in call:
                migration = update.migration
                if state_of(migration) in FINAL:
                    break
        finally:
            call.cancel()
        if state_of(migration) is not State.DONE:
            raise click.ClickException(f"{migration.id} ended {state_of(migration).name}: {migration.error}")
        return migration

    async def settled(self, uuid: str, is_there: Callable[[Guest], bool], quiet_s: float) -> None:
        """Waits until the controller's record of a guest is as it should be, and the machine is quiet again."""
        async with asyncio.timeout(self._deadline_s):
            while True:
                if await self._is(uuid, is_there):
                    break
                await asyncio.sleep(POLL_S)
        await asyncio.sleep(quiet_s)

    async def _is(self, uuid: str, is_there: Callable[[Guest], bool]) -> bool:
        try:
            guest = (await self._guests.GetGuest(GetGuestRequest(guest=uuid), timeout=CALL_S)).guest
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            return False
        return not guest.active_migration and not guest.conflicts and is_there(guest)
