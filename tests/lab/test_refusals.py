"""Bad requests get a precise error, before anything is touched."""

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import grpc.aio
import pytest
from moves import Moves, Subject, unsettled

from handoff.controller.v1.migrations_pb2 import CreateMigrationRequest, MigrationOptions
from handoff_controller.machine import State, state_of
from handoff_lab.fleet import Fleet
from handoff_lab.guest import Guests

pytestmark = pytest.mark.lab


@contextmanager
def refused(code: grpc.StatusCode, *words: str) -> Iterator[None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    assert caught.value.code() is code, caught.value
    for word in words:
        assert word in (caught.value.details() or "")


async def test_unknown_guest(moves: Moves) -> None:
    with refused(grpc.StatusCode.NOT_FOUND, "no guest 'nobody'", "handoff guests"):
        await moves.create("nobody", "h2")


async def test_unknown_host(subject: Subject) -> None:
    here = await subject.host()
    with refused(grpc.StatusCode.NOT_FOUND, "no host 'h9'", "h1, h2, h3"):
        await subject.moves.create(subject.name, "h9")
    await subject.must_be_at(here)


async def test_same_host(subject: Subject) -> None:
    here = await subject.host()
    with refused(grpc.StatusCode.INVALID_ARGUMENT, f"is on {here} already"):
        await subject.moves.create(subject.name, here)
    await subject.must_be_at(here)


async def test_nonsense_options(subject: Subject) -> None:
    there = await subject.away()
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "1 MiB/s"):
        await subject.moves.create(subject.name, there, MigrationOptions(bandwidth_bytes_per_s=1000))
    options = MigrationOptions(downtime_limit_ms=3000)
    options.switch_deadline.FromSeconds(1)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "switch deadline"):
        await subject.moves.create(subject.name, there, options)


async def test_no_memory_there(moves: Moves, guests: Guests, fleet: Fleet) -> None:
    big = await Subject.create(moves, "big", "h1", memory_mib=512)
    await asyncio.to_thread(guests.create, "ballast", "h2", 1700, 1, (), "none", False)
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "host h2 has", "free for guests"):
        await moves.create(big.name, "h2")
    await big.must_be_at("h1")
    assert await unsettled(fleet, "h2") == []


async def test_a_second_migration_of_the_same_guest(subject: Subject) -> None:
    there = await subject.away()
    first = await subject.moves.create(subject.name, there, MigrationOptions(bandwidth_bytes_per_s=4 << 20))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, first.id):
        await subject.moves.create(subject.name, there)
    await subject.moves.cancel(first.id)
    await subject.moves.ends(first.id)


async def test_the_same_request_twice_is_one_migration(subject: Subject) -> None:
    there = await subject.away()
    request = CreateMigrationRequest(guest=subject.name, destination_host=there, request_id="once-only")
    answers = [await subject.moves.api(name).CreateMigration(request, timeout=20) for name in subject.moves.controllers]
    assert {answer.migration.id for answer in answers} == {"once-only"}
    assert state_of(await subject.moves.ends("once-only")) is State.DONE
    await subject.must_be_at(there)


@pytest.mark.parametrize("how", ["agent killed", "agent frozen", "host off the network"])
async def test_host_down(subject: Subject, fleet: Fleet, how: str) -> None:
    """The refusal comes within seconds, also when the other side is only silent."""
    here, there = await subject.host(), await subject.away()
    agent = fleet.daemon(there, "agent")
    if how == "agent killed":
        agent.signal(signal.SIGKILL)
    elif how == "agent frozen":
        agent.signal(signal.SIGSTOP)
    else:
        fleet.set_link(there, up=False)
    began = time.monotonic()
    try:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await subject.moves.create(subject.name, there)
        assert time.monotonic() - began < 10
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        assert there in (caught.value.details() or "")
    finally:
        if how == "agent frozen":
            agent.signal(signal.SIGCONT)
        fleet.set_link(there, up=True)
        await asyncio.to_thread(fleet.up)
    await subject.must_be_at(here)
