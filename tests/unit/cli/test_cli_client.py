"""Failover, against real gRPC servers on loopback."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from cli_samples import COPYING, PLANNED, PREPARING, WHOLE_WAY, a_host, a_migration, copying
from conftest import StartController
from fake_controller import FakeController, Fleet

from handoff.controller.v1.migrations_pb2 import CreateMigrationRequest, Migration
from handoff_cli import failover
from handoff_cli.client import Controllers
from handoff_common.errors import (
    ConflictError,
    DeadlineError,
    ExhaustedError,
    HostDownError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)

REQUEST = CreateMigrationRequest(guest="web-1", destination_host="h2", request_id="20260314-092653-aaaa")
NO_LEADER = "no controller leads at the moment; try again in a few seconds"


async def states(watch: AsyncIterator[Migration]) -> list[int]:
    async with asyncio.timeout(20):
        return [migration.state async for migration in watch]


async def test_the_next_controller_is_asked_when_one_refuses_the_connection(
    fleet: Fleet, controller: FakeController, nobody: str
) -> None:
    fleet.hosts.append(a_host())
    async with Controllers([nobody, controller.address], 10) as controllers:
        assert [host.name for host in (await controllers.hosts()).hosts] == ["h1"]


async def test_a_frozen_controller_costs_two_seconds_and_is_not_asked_first_again(
    fleet: Fleet, controller: FakeController, frozen: str
) -> None:
    async with Controllers([frozen, controller.address], 10) as controllers:
        began = time.monotonic()
        await controllers.hosts()
        assert time.monotonic() - began < failover.GREETING_S + 1
        began = time.monotonic()
        await controllers.hosts()
        assert time.monotonic() - began < failover.GREETING_S


async def test_when_none_answers_the_error_names_each_and_why(frozen: str, nobody: str) -> None:
    async with Controllers([nobody, frozen], 10) as controllers:
        with pytest.raises(UnavailableError) as caught:
            await controllers.hosts()
    assert f"{nobody}: Connection refused" in caught.value.message
    assert f"{frozen}: connection attempt timed out" in caught.value.message


async def test_the_deadline_holds_for_all_tries_together(frozen: str) -> None:
    async with Controllers([frozen, *(f"127.0.0.{n}:{frozen.split(':')[1]}" for n in range(1, 3))], 1.5) as controllers:
        began = time.monotonic()
        with pytest.raises(UnavailableError):
            await controllers.hosts()
        assert time.monotonic() - began < failover.GREETING_S + 1


@pytest.mark.parametrize("kind", [NotFoundError, PreconditionError, ExhaustedError, HostDownError])
async def test_a_refusal_is_final_and_told_as_it_is(
    kind: type[NotFoundError], start_controller: StartController
) -> None:
    first, second = await start_controller(), await start_controller()
    first.refusals.append(kind("web-1 can't move to h2: reasons"))
    async with Controllers([first.address, second.address], 10) as controllers:
        with pytest.raises(kind, match="web-1 can't move to h2: reasons"):
            await controllers.create(REQUEST)
    assert not second.calls


@pytest.mark.parametrize("refusal", [UnavailableError(NO_LEADER), ConflictError("changed by another writer")])
async def test_a_create_goes_on_while_nobody_leads(refusal: UnavailableError, controller: FakeController) -> None:
    controller.refusals += [refusal, refusal]
    troubles: list[str] = []
    async with Controllers([controller.address], 10, troubles.append) as controllers:
        assert (await controllers.create(REQUEST)).id == REQUEST.request_id
    assert troubles == [f"{controller.address}: {NO_LEADER}; trying again"] * 2 or "another writer" in troubles[0]
    assert len(controller.created) == 1


async def test_nobody_leads_until_the_deadline(controller: FakeController) -> None:
    controller.refusals += [UnavailableError(NO_LEADER)] * 20
    async with Controllers([controller.address], 1.2) as controllers:
        with pytest.raises(UnavailableError, match=NO_LEADER):
            await controllers.create(REQUEST)
    assert not controller.created


async def test_a_create_whose_answer_was_lost_is_not_done_twice(
    start_controller: StartController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failover, "WRITE_S", 0.5)
    first, second = await start_controller(), await start_controller()
    first.drop_answers = 1
    async with Controllers([first.address, second.address], 10) as controllers:
        assert (await controllers.create(REQUEST)).id == REQUEST.request_id
    assert len(first.created) + len(second.created) == 1


async def test_our_own_unanswered_create_does_not_stand_in_our_way(
    start_controller: StartController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failover, "WRITE_S", 0.5)
    first, second = await start_controller(), await start_controller()
    first.drop_answers = 1
    second.refusals.append(PreconditionError(f"web-1 is being moved by migration {REQUEST.request_id}"))
    async with Controllers([first.address, second.address], 10) as controllers:
        assert (await controllers.create(REQUEST)).id == REQUEST.request_id


async def test_a_lost_answer_is_not_called_a_failure(
    controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failover, "WRITE_S", 0.3)
    controller.drop_answers = 100
    async with Controllers([controller.address], 1) as controllers:
        with pytest.raises(DeadlineError, match="did not answer in time"):
            await controllers.create(REQUEST)


async def test_a_create_that_reached_nobody_has_certainly_not_been_done(nobody: str) -> None:
    async with Controllers([nobody], 10) as controllers:
        with pytest.raises(UnavailableError, match="no controller answered"):
            await controllers.create(REQUEST)


async def test_a_guest_may_be_named_by_its_uuid_in_any_case(fleet: Fleet, controller: FakeController) -> None:
    known = a_migration(id=REQUEST.request_id)
    await fleet.put(known)
    request = CreateMigrationRequest(
        guest=known.guest_uuid.upper(), destination_host="h2", request_id=REQUEST.request_id
    )
    async with Controllers([controller.address], 10) as controllers:
        assert await controllers.create(request) == known


async def test_a_request_id_of_another_migration_is_refused(fleet: Fleet, controller: FakeController) -> None:
    await fleet.put(a_migration(id=REQUEST.request_id, guest_name="db-1"))
    async with Controllers([controller.address], 10) as controllers:
        with pytest.raises(PreconditionError, match="belongs to the migration of db-1 to h2"):
            await controllers.create(REQUEST)


async def test_a_watch_goes_on_with_another_controller_when_its_own_dies(
    fleet: Fleet, start_controller: StartController
) -> None:
    first, second = await start_controller(), await start_controller()
    await fleet.put(copying(0.5))
    troubles: list[str] = []
    seen: list[int] = []
    async with Controllers([first.address, second.address], 10, troubles.append) as controllers, asyncio.timeout(20):
        async for migration in controllers.watch("20260314"):
            seen.append(migration.state)
            if len(seen) == 1:
                await first.stop()
                await fleet.put(a_migration())
    assert seen == [COPYING, WHOLE_WAY[-1]]
    assert "WatchMigration" in second.calls
    assert all(second.address in trouble for trouble in troubles)


async def test_a_watch_survives_a_time_without_any_controller(fleet: Fleet, start_controller: StartController) -> None:
    first = await start_controller()
    await fleet.put(copying(0.5))
    seen: list[int] = []
    async with Controllers([first.address], 20) as controllers, asyncio.timeout(20):
        async for migration in controllers.watch("20260314"):
            seen.append(migration.state)
            if len(seen) == 1:
                await first.stop()
                await fleet.put(a_migration())
                asyncio.get_running_loop().call_later(1, lambda: asyncio.ensure_future(start_controller(first.address)))
    assert seen == [COPYING, WHOLE_WAY[-1]]


async def test_a_watch_leaves_a_controller_that_falls_silent(
    fleet: Fleet, start_controller: StartController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failover, "STREAM_SILENCE_S", 0.3)
    first, second = await start_controller(), await start_controller()
    await fleet.put(copying(0.5))
    async with Controllers([first.address, second.address], 10) as controllers:
        watch = controllers.watch("20260314")
        assert (await anext(watch)).state == COPYING
        first.mute = True
        await fleet.put(a_migration())
        assert await states(watch) == [WHOLE_WAY[-1]]


async def test_a_waiting_migration_may_be_silent_for_as_long_as_it_likes(
    fleet: Fleet, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failover, "STREAM_SILENCE_S", 0.1)
    await fleet.put(a_migration((PLANNED,)))
    troubles: list[str] = []
    async with Controllers([controller.address], 0.5, troubles.append) as controllers:
        watch = controllers.watch("20260314")
        assert (await anext(watch)).state == PLANNED
        asyncio.get_running_loop().call_later(1.5, lambda: asyncio.ensure_future(fleet.put(a_migration())))
        assert await states(watch) == [WHOLE_WAY[-1]]
    assert not troubles


async def test_a_watch_never_goes_back_in_time(fleet: Fleet, start_controller: StartController) -> None:
    behind = Fleet(migrations={"20260314-092653-5d3a": a_migration((PLANNED, PREPARING))})
    first, second = await start_controller(), await start_controller()
    second.fleet = behind
    await fleet.put(copying(0.5))
    async with Controllers([first.address, second.address], 10) as controllers:
        watch = controllers.watch("20260314")
        assert (await anext(watch)).state == COPYING
        await first.stop()
        await behind.put(a_migration())
        assert await states(watch) == [WHOLE_WAY[-1]]


async def test_a_watch_gives_up_when_nobody_speaks_any_more(fleet: Fleet, controller: FakeController) -> None:
    await fleet.put(copying(0.5))
    async with Controllers([controller.address], 1) as controllers:
        watch = controllers.watch("20260314")
        await anext(watch)
        await controller.stop()
        with pytest.raises(UnavailableError):
            await states(watch)


async def test_a_watch_that_finds_nobody_says_so_at_once(nobody: str, frozen: str) -> None:
    async with Controllers([nobody, frozen], 30) as controllers:
        began = time.monotonic()
        with pytest.raises(UnavailableError):
            await states(controllers.watch("20260314"))
        assert time.monotonic() - began < failover.GREETING_S + 1


async def test_a_watch_of_no_migration(controller: FakeController) -> None:
    async with Controllers([controller.address], 10) as controllers:
        with pytest.raises(NotFoundError, match="no migration 'x'"):
            await states(controllers.watch("x"))
