"""What a request becomes, or why it is refused with nothing touched."""

from collections.abc import Callable
from typing import cast

import pytest
from instant_agents import InstantAgent, InstantAgents
from records import UUID, domain, guest, place

from handoff.agent.v1.host_pb2 import Host
from handoff.agent.v1.qemu_pb2 import Handoff, SourceGuest, TransferMethod
from handoff.agent.v1.types_pb2 import Fence
from handoff.controller.v1.guests_pb2 import Guest
from handoff.controller.v1.migrations_pb2 import CreateMigrationRequest
from handoff_common.errors import (
    ExhaustedError,
    HandoffError,
    InvalidArgumentError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from handoff_controller.agents import Agents
from handoff_controller.machine import State, state_of
from handoff_controller.planner import Planner
from handoff_controller.store import Store


class Unwilling(InstantAgent):
    """A host that is down, or does not take or let go of the guest."""

    def __init__(self, name: str, *, down: bool = False, full: bool = False, keeps: bool = False) -> None:
        super().__init__(name, [domain()])
        self._down, self._full, self._keeps = down, full, keeps

    async def get_host(self) -> Host:
        if self._down:
            raise UnavailableError(f"agent of {self.name}: connection refused")
        return await super().get_host()

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
        if self._keeps:
            raise PreconditionError("disk vda is local")
        return await super().prepare_source(fence, migration_id, domain_uuid, validate_only=validate_only)

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
        if self._full:
            raise ExhaustedError(f"{self.name} has 1 GiB free, web needs 2 GiB")
        return await super().prepare_destination(fence, migration_id, guest, slot, validate_only=validate_only)


def planner(store: Store, *agents: InstantAgent) -> Planner:
    return Planner(store, cast(Agents, InstantAgents(agents)), Fence(term=7, leader="c"))


def request(guest: str = "web", host: str = "h2", request_id: str = "") -> CreateMigrationRequest:
    return CreateMigrationRequest(guest=guest, destination_host=host, request_id=request_id)


async def test_the_plan(store: Store) -> None:
    await store.put_guest(guest())

    planned = await planner(store, Unwilling("h1"), Unwilling("h2")).plan(request(UUID, request_id="mine"))

    assert (planned.id, planned.guest_uuid, planned.guest_name) == ("mine", UUID, "web")
    assert (planned.source, planned.destination) == (place("h1"), place("h2"))
    assert planned.options.downtime_limit_ms == 300
    assert state_of(planned) is State.PLANNED
    assert [(line.state, line.term) for line in planned.timeline] == [(State.PLANNED.value, 7)]
    assert await store.migrations() == ()


@pytest.mark.parametrize(
    ("asked", "error", "told"),
    [
        (request(guest=""), InvalidArgumentError, "no guest given"),
        (request(host=""), InvalidArgumentError, "no destination host given"),
        (request(request_id="a b"), InvalidArgumentError, "letters, digits and dashes"),
        (request(request_id="x" * 65), InvalidArgumentError, "at most 64"),
        # Agents take no such id: not even the abort would get through.
        (request(request_id="-x"), InvalidArgumentError, "not a dash first"),
        (request(guest="nobody"), NotFoundError, "no guest 'nobody'"),
        (request(host="nowhere"), NotFoundError, "no host 'nowhere'"),
        (request(host="h1"), InvalidArgumentError, "web is on h1 already"),
    ],
)
async def test_a_request_that_is_wrong(
    store: Store, asked: CreateMigrationRequest, error: type[HandoffError], told: str
) -> None:
    await store.put_guest(guest())
    h1, h2 = Unwilling("h1"), Unwilling("h2")

    with pytest.raises(error, match=told):
        await planner(store, h1, h2).plan(asked)

    assert h1.calls + h2.calls == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda record: setattr(record, "active_migration", "m9"), "is being moved by migration m9"),
        (lambda record: record.conflicts.append("h3"), "also runs on h3"),
    ],
)
async def test_a_guest_that_is_not_free(store: Store, change: Callable[[Guest], None], told: str) -> None:
    change(record := guest())
    await store.put_guest(record)

    with pytest.raises(PreconditionError, match=told):
        await planner(store, Unwilling("h1"), Unwilling("h2")).plan(request())


@pytest.mark.parametrize(
    ("source", "destination", "error", "told"),
    [
        (Unwilling("h1"), Unwilling("h2", down=True), UnavailableError, "can't move web to h2: agent of h2"),
        (Unwilling("h1", keeps=True), Unwilling("h2"), PreconditionError, "can't move web to h2: disk vda is local"),
        (Unwilling("h1"), Unwilling("h2", full=True), ExhaustedError, "h2 has 1 GiB free"),
    ],
    ids=["host down", "guest can't leave", "no memory there"],
)
async def test_a_host_that_says_no(
    store: Store, source: InstantAgent, destination: InstantAgent, error: type[HandoffError], told: str
) -> None:
    await store.put_guest(guest())

    with pytest.raises(error, match=told):
        await planner(store, source, destination).plan(request())

    assert source.calls + destination.calls == []
    assert await store.migrations() == ()
