"""The controllers and the agents, as the soak asks them: by their sockets, with patience while parts are broken."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Final

import grpc.aio

from handoff.agent.v1.flow_pb2 import GetNetworkRequest, GetNetworkResponse
from handoff.agent.v1.flow_pb2_grpc import FlowServiceStub
from handoff.agent.v1.qemu_pb2 import (
    Handoff,
    HandoffRole,
    HandoffState,
    ListDomainsRequest,
    ListHandoffsRequest,
    WatchHandoffRequest,
)
from handoff.agent.v1.qemu_pb2_grpc import QemuServiceStub
from handoff.agent.v1.types_pb2 import Domain, DomainState
from handoff.controller.v1.guests_pb2 import Guest, ListGuestsRequest
from handoff.controller.v1.guests_pb2_grpc import GuestsServiceStub
from handoff.controller.v1.hosts_pb2 import Host, ListHostsRequest
from handoff.controller.v1.hosts_pb2_grpc import HostsServiceStub
from handoff.controller.v1.migrations_pb2 import (
    CancelMigrationRequest,
    CreateMigrationRequest,
    GetMigrationRequest,
    Migration,
    MigrationOptions,
    WatchMigrationRequest,
)
from handoff.controller.v1.migrations_pb2_grpc import MigrationsServiceStub
from handoff_common.channel import open_channel
from handoff_controller.machine import FINAL, State, state_of
from handoff_lab.state import Lab

CALL_S: Final = 8.0
RETRY_S: Final = 0.2
# A watch that says nothing for so long is opened again, at another controller.
WATCH_S: Final = 6.0


class Missed(Exception):  # noqa: N818 - an outcome of the soak, not an error of the program
    """The migration did not come to the state that was waited for."""


class Controllers:
    """The API. `ask_first` is the controller that is asked before the others: one that is not to be broken."""

    def __init__(self, lab: Lab, names: Sequence[str]) -> None:
        self._channels = {name: open_channel(f"unix:{lab.controller_socket(name)}") for name in names}
        self.ask_first = names[0]

    async def close(self) -> None:
        """Closes the channels."""
        for channel in self._channels.values():
            await channel.close()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, the one that is asked first in front."""
        return (self.ask_first, *(name for name in self._channels if name != self.ask_first))

    async def create(self, guest: str, host: str, bandwidth_bytes_per_s: int = 0) -> Migration:
        """Creates a migration. Raises AioRpcError when it is refused."""
        options = MigrationOptions(bandwidth_bytes_per_s=bandwidth_bytes_per_s)
        request = CreateMigrationRequest(guest=guest, destination_host=host, options=options)
        stub = MigrationsServiceStub(self._channels[self.ask_first])
        return (await stub.CreateMigration(request, timeout=20, wait_for_ready=True)).migration

    async def cancel(self, migration_id: str, patience_s: float = 40.0) -> None:
        """Asks for the abort, again and again until it is heard; one that comes too late is fine."""
        stub = MigrationsServiceStub(self._channels[self.ask_first])
        async with asyncio.timeout(patience_s):
            while True:
                try:
                    await stub.CancelMigration(
                        CancelMigrationRequest(id=migration_id), timeout=CALL_S, wait_for_ready=True
                    )
                    return
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                        return
                await asyncio.sleep(RETRY_S)

    async def get(self, migration_id: str) -> Migration:
        """The record. Raises AioRpcError."""
        stub = MigrationsServiceStub(self._channels[self.ask_first])
        return (
            await stub.GetMigration(GetMigrationRequest(id=migration_id), timeout=CALL_S, wait_for_ready=True)
        ).migration

    async def watch(self, migration_id: str) -> AsyncGenerator[Migration, None]:
        """The record as it changes, until it is final; goes on over the death of any controller."""
        names = self.names
        turn = 0
        while True:
            stub = MigrationsServiceStub(self._channels[names[turn % len(names)]])
            call = stub.WatchMigration(WatchMigrationRequest(id=migration_id), timeout=WATCH_S)
            try:
                async for update in call:
                    yield update.migration
                    if state_of(update.migration) in FINAL:
                        return
            except grpc.aio.AioRpcError:
                turn += 1
                await asyncio.sleep(RETRY_S)
            finally:
                call.cancel()

    async def until(self, migration_id: str, wanted: Callable[[Migration], bool], deadline_s: float) -> Migration:
        """Waits until the record is as wanted. Raises Missed when it is final and not so, or at the deadline."""
        last: Migration | None = None
        try:
            async with asyncio.timeout(deadline_s), aclosing(self.watch(migration_id)) as updates:
                async for last in updates:
                    if wanted(last):
                        return last
        except TimeoutError:
            pass
        raise Missed(f"waited {deadline_s:g} s; it is {story(last)}" if last else "nobody knows the migration")

    async def reaches(self, migration_id: str, state: State, deadline_s: float = 30.0) -> Migration:
        """Waits for a state. Raises Missed."""
        return await self.until(migration_id, lambda migration: state_of(migration) is state, deadline_s)

    async def ends(self, migration_id: str, deadline_s: float) -> Migration:
        """Waits for a final state. Raises Missed."""
        return await self.until(migration_id, lambda migration: state_of(migration) in FINAL, deadline_s)

    async def guest(self, uuid: str) -> Guest | None:
        """The record of a guest. Raises AioRpcError."""
        stub = GuestsServiceStub(self._channels[self.ask_first])
        guests = (await stub.ListGuests(ListGuestsRequest(), timeout=CALL_S, wait_for_ready=True)).guests
        return next((guest for guest in guests if guest.uuid == uuid), None)

    async def hosts(self) -> list[Host]:
        """The hosts. Raises AioRpcError."""
        stub = HostsServiceStub(self._channels[self.ask_first])
        return list((await stub.ListHosts(ListHostsRequest(), timeout=CALL_S, wait_for_ready=True)).hosts)


class AgentSide:
    """One agent, asked directly."""

    def __init__(self, lab: Lab, host: str) -> None:
        self._address = f"unix:{lab.agent_socket(host)}"

    async def reaches(
        self, migration_id: str, role: "HandoffRole.ValueType", states: frozenset[int], deadline_s: float = 20.0
    ) -> Handoff:
        """Waits until its side of a handoff is in one of `states`. Raises Missed."""
        async with open_channel(self._address) as channel:
            call = QemuServiceStub(channel).WatchHandoff(
                WatchHandoffRequest(migration_id=migration_id, role=role), timeout=deadline_s
            )
            last = "unknown"
            try:
                async for response in call:
                    if response.handoff.state in states:
                        return response.handoff
                    last = f"{HandoffState.Name(response.handoff.state)} ({response.handoff.progress.decision})"
            except grpc.aio.AioRpcError as error:
                raise Missed(f"the agent's side of {migration_id} is {last}: {error.details()}") from error
            finally:
                call.cancel()
        raise Missed(f"the agent's side of {migration_id} ended")

    async def domain(self, uuid: str) -> Domain | None:
        """A domain as the agent sees it. Raises AioRpcError."""
        async with open_channel(self._address) as channel:
            answer = await QemuServiceStub(channel).ListDomains(
                ListDomainsRequest(), timeout=CALL_S, wait_for_ready=True
            )
        return next((domain for domain in answer.domains if domain.uuid == uuid), None)

    async def network(self) -> GetNetworkResponse:
        """The tenants' networks as its host has them. Raises AioRpcError."""
        async with open_channel(self._address) as channel:
            answer: GetNetworkResponse = await FlowServiceStub(channel).GetNetwork(
                GetNetworkRequest(), timeout=CALL_S, wait_for_ready=True
            )
            return answer

    async def pauses(self, uuid: str, deadline_s: float = 2.0) -> None:
        """Waits until a domain is paused. Raises TimeoutError, AioRpcError."""
        async with asyncio.timeout(deadline_s):
            while True:
                domain = await self.domain(uuid)
                if domain is not None and domain.state == DomainState.DOMAIN_STATE_PAUSED:
                    return
                await asyncio.sleep(0.01)

    async def handoffs(self) -> list[Handoff]:
        """All that it remembers. Raises AioRpcError."""
        async with open_channel(self._address) as channel:
            return list(
                (
                    await QemuServiceStub(channel).ListHandoffs(
                        ListHandoffsRequest(), timeout=CALL_S, wait_for_ready=True
                    )
                ).handoffs
            )


def story(migration: Migration) -> str:
    """A migration in a line."""
    states = " → ".join(State(change.state).name for change in migration.timeline)
    return f"{states}: {migration.error} {list(migration.warnings)} {migration.needs_decision}"
