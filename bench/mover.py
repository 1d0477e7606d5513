"""Moves a lab's guests by the controller's API, as the `handoff` command does."""

import asyncio
import time
from types import TracebackType
from typing import Self

import click
import grpc
import grpc.aio

from handoff.controller.v1.guests_pb2 import GetGuestRequest
from handoff.controller.v1.guests_pb2_grpc import GuestsServiceStub
from handoff.controller.v1.migrations_pb2 import (
    CreateMigrationRequest,
    Migration,
    MigrationOptions,
    WatchMigrationRequest,
)
from handoff.controller.v1.migrations_pb2_grpc import MigrationsServiceStub
from handoff_common.channel import open_channel
from handoff_controller.machine import FINAL, State, state_of
from handoff_lab.state import Lab

CALL_S = 60.0
KNOWN_S = 60.0
POLL_S = 0.1


class Mover:
    """A client of the lab's first controller."""

    def __init__(self, lab: Lab, deadline_s: float) -> None:
        """`deadline_s`: for one move."""
        self._address = f"unix:{lab.controller_socket('ctl1')}"
        self._deadline_s = deadline_s

    async def __aenter__(self) -> Self:
        self._channel = open_channel(self._address)
        self._guests, self._migrations = GuestsServiceStub(self._channel), MigrationsServiceStub(self._channel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def known(self, guest: str, host: str) -> None:
        """Waits until the controller knows that the guest is there and free."""
        until = time.monotonic() + KNOWN_S
        while not await self._is_at(guest, host):
            if time.monotonic() > until:
                raise click.ClickException(f"the controller does not see {guest} on {host}")
            await asyncio.sleep(POLL_S)

    async def _is_at(self, name: str, host: str) -> bool:
        try:
            guest = (await self._guests.GetGuest(GetGuestRequest(guest=name), timeout=CALL_S)).guest
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            return False
        return guest.owner.host == host and not guest.active_migration

    async def move(self, guest: str, host: str, options: MigrationOptions) -> tuple[Migration, float]:
        """Moves the guest; the record at the end, and milliseconds from the request until then."""
        began = time.monotonic()
        request = CreateMigrationRequest(guest=guest, destination_host=host, options=options)
        migration = (await self._migrations.CreateMigration(request, timeout=CALL_S)).migration
        call = self._migrations.WatchMigration(WatchMigrationRequest(id=migration.id), timeout=self._deadline_s)
        try:
            async for update in call:
                migration = update.migration
                if state_of(migration) in FINAL:
                    break
        finally:
            call.cancel()
        total_ms = 1000 * (time.monotonic() - began)
        if state_of(migration) is not State.DONE:
            raise click.ClickException(f"{migration.id} ended {state_of(migration).name}: {migration.error}")
        return migration, total_ms
