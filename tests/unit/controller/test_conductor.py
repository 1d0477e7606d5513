"""The leader's work on a real etcd, with agents that are quick and honest."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest
from etcd_cluster import until
from instant_agents import InstantAgent, InstantAgents
from leading import Lead
from records import domain, migration

from handoff.controller.v1.migrations_pb2 import CreateMigrationRequest, Migration, MigrationState
from handoff_common.errors import NotFoundError, PreconditionError, StaleTermError, UnavailableError
from handoff_controller import conductor as module
from handoff_controller.agents import Agents
from handoff_controller.conductor import Conductor
from handoff_controller.driver import Driver
from handoff_controller.etcd.client import EtcdClient
from handoff_controller.etcd.election import Leadership
from handoff_controller.etcd.txn import put
from handoff_controller.machine import State, state_of
from handoff_controller.settings import ControllerSettings, EtcdSettings
from handoff_controller.store import MIGRATIONS, Reader, Store, encode

WEB, DB, MAIL = "uuid-web", "uuid-db", "uuid-mail"


class Fleet:
    """Two hosts with three guests on the first, and whoever leads."""

    def __init__(self, client: EtcdClient) -> None:
        self.h1 = InstantAgent("h1", [domain(WEB, "web"), domain(DB, "db"), domain(MAIL, "mail")])
        self.h2 = InstantAgent("h2")
        self.reader = Reader(client)
        self._client = client
        self._agents = InstantAgents([self.h1, self.h2])

    @asynccontextmanager
    async def led_by(self, leadership: Leadership) -> AsyncIterator[Conductor]:
        settings = ControllerSettings(
            name="c",
            advertise="127.0.0.1:1",
            etcd=EtcdSettings(endpoints=("127.0.0.1:1",)),
            hosts={name: f"{name}:7701" for name in self._agents.names()},
        )
        conductor = Conductor(self._client, leadership, cast(Agents, self._agents), settings)
        work = asyncio.create_task(conductor.run())
        try:
            yield conductor
        finally:
            work.cancel()
            await asyncio.wait({work})
        if not work.cancelled() and (error := work.exception()) is not None:
            raise error

    async def is_in(self, migration_id: str, state: State, deadline_s: float = 10) -> Migration:
        async def there() -> bool:
            return state_of(await self.reader.migration(migration_id)) is state

        await until(there, deadline_s)
        return await self.reader.migration(migration_id)

    async def waits(self, migration_id: str) -> Migration:
        async def noted() -> bool:
            return bool((await self.reader.migration(migration_id)).waiting_for)

        await until(noted, 10)
        return await self.reader.migration(migration_id)


@pytest.fixture
def fleet(client: EtcdClient, empty: None) -> Fleet:
    return Fleet(client)


def move(guest: str, migration_id: str, to: str = "h2") -> CreateMigrationRequest:
    return CreateMigrationRequest(guest=guest, destination_host=to, request_id=migration_id)


def states(migration: Migration) -> list[str]:
    return [state_of(Migration(state=change.state)).name for change in migration.timeline]


async def test_a_guest_moves(fleet: Fleet, lead: Lead) -> None:
    fleet.h1.may_copy.set()
    async with fleet.led_by(await lead()) as conductor:
        created = await conductor.create(move("web", "m1"))
        done = await fleet.is_in("m1", State.DONE)

    assert state_of(created) is State.PLANNED
    assert states(done) == ["PLANNED", "PREPARING", "COPYING", "SWITCHING", "COMMITTED", "FINISHING", "DONE"]
    assert (await fleet.reader.guest("web")).owner.host == "h2"


async def test_the_same_request_is_the_same_migration(fleet: Fleet, lead: Lead) -> None:
    async with fleet.led_by(await lead()) as conductor:
        await conductor.create(move("db", "m10"))
        await conductor.create(move("mail", "m11"))
        first = await conductor.create(move("web", "m1"))
        again = await conductor.create(move("web", "m1"))

    assert (first.id, again.id) == ("m1", "m1")
    assert len(await fleet.reader.migrations()) == 3


async def test_two_between_the_same_hosts_go_one_after_the_other(fleet: Fleet, lead: Lead) -> None:
    async with fleet.led_by(await lead()) as conductor:
        await conductor.create(move("web", "m1"))
        await conductor.create(move("db", "m2"))
        waiting = await fleet.waits("m2")
        assert waiting.waiting_for == "m1 is moving between h1 and h2 (admission.max_parallel_per_pair is 1)"
        await fleet.is_in("m1", State.COPYING)
        assert state_of(await fleet.reader.migration("m2")) is State.PLANNED

        fleet.h1.may_copy.set()
        first, second = await fleet.is_in("m1", State.DONE), await fleet.is_in("m2", State.DONE)

    assert first.end_time.ToNanoseconds() <= second.timeline[1].time.ToNanoseconds()
    assert second.waiting_for == ""


async def test_a_cancel_while_it_waits_touches_nothing(fleet: Fleet, lead: Lead) -> None:
    async with fleet.led_by(await lead()) as conductor:
        await conductor.create(move("web", "m1"))
        await conductor.create(move("db", "m2"))
        await conductor.create(move("mail", "m3"))
        await fleet.waits("m3")

        assert (await conductor.cancel("m2")).cancel_requested
        aborted = await fleet.is_in("m2", State.ABORTED)
        fleet.h1.may_copy.set()
        await fleet.is_in("m3", State.DONE)

        with pytest.raises(PreconditionError, match="ABORTED already"):
            await conductor.cancel("m2")
        with pytest.raises(NotFoundError):
            await conductor.cancel("m9")

    assert states(aborted) == ["PLANNED", "ABORTED"]
    assert aborted.error == "cancelled by the operator while PLANNED"
    assert "m2" not in {migration_id for _, migration_id in fleet.h1.calls + fleet.h2.calls}
    assert (await fleet.reader.guest("db")).active_migration == ""


async def test_a_cancel_while_it_copies_is_undone_on_both_hosts(fleet: Fleet, lead: Lead) -> None:
    async with fleet.led_by(await lead()) as conductor:
        await conductor.create(move("web", "m1"))
        await fleet.is_in("m1", State.COPYING)
        await conductor.cancel("m1")
        await fleet.is_in("m1", State.ABORTED)

    assert ("abort", "m1") in fleet.h1.calls
    assert ("abort", "m1") in fleet.h2.calls
    assert (await fleet.reader.guest("web")).owner.host == "h1"


async def test_a_destination_that_is_gone_after_the_copy_does_not_get_the_guest(fleet: Fleet, lead: Lead) -> None:
    async with fleet.led_by(await lead()) as conductor:
        await conductor.create(move("web", "m1"))
        await fleet.is_in("m1", State.COPYING)
        await fleet.h2.fail("m1", "its QEMU ended")
        fleet.h1.may_copy.set()
        aborted = await fleet.is_in("m1", State.ABORTED)

    assert states(aborted)[-3:] == ["SWITCHING", "ABORTING", "ABORTED"]
    assert aborted.error == "h2: its QEMU ended"
    assert ("switch_over", "m1") not in fleet.h1.calls


async def test_the_next_leader_adopts_what_is_in_flight(fleet: Fleet, lead: Lead) -> None:
    async with fleet.led_by(await lead()) as conductor:
        await conductor.create(move("web", "m1"))
        await conductor.create(move("db", "m2"))
        await fleet.is_in("m1", State.COPYING)
        await fleet.waits("m2")

    async with fleet.led_by(second := await lead()):
        fleet.h1.may_copy.set()
        done = await fleet.is_in("m1", State.DONE)
        await fleet.is_in("m2", State.DONE)

    assert [change.term == second.term for change in done.timeline] == [False] * 3 + [True] * 4


async def test_a_replaced_leader_ends_with_stale_term(fleet: Fleet, lead: Lead) -> None:
    with pytest.raises(StaleTermError):
        async with fleet.led_by(await lead()) as old:
            await old.create(move("web", "m1"))
            await fleet.is_in("m1", State.COPYING)
            async with fleet.led_by(await lead()):
                fleet.h1.may_copy.set()
                await fleet.is_in("m1", State.DONE)
                with pytest.raises(StaleTermError):
                    await old.create(move("db", "m2"))
                await asyncio.sleep(0.5)


async def test_a_record_without_a_driver_is_adopted(
    fleet: Fleet, lead: Lead, client: EtcdClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ADOPT_EVERY_S", 0.1)
    fleet.h1.may_copy.set()
    leadership = await lead()
    async with fleet.led_by(leadership) as conductor:
        # The planner's migration, written by a create whose answer was lost.
        lost: list[Migration] = []
        real = Store.create

        async def unanswered(store: Store, migration: Migration) -> Migration:
            lost.append(await real(store, migration))
            raise UnavailableError("no answer")

        monkeypatch.setattr(Store, "create", unanswered)
        with pytest.raises(UnavailableError):
            await conductor.create(move("web", "m1"))
        await fleet.is_in("m1", State.DONE)

    assert [migration.id for migration in lost] == ["m1"]


async def test_a_bug_in_one_driver_stops_no_other(fleet: Fleet, lead: Lead, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Driver.run

    async def run(driver: Driver) -> Migration:
        if driver.migration.guest_name == "db":
            raise ZeroDivisionError
        return await real(driver)

    monkeypatch.setattr(Driver, "run", run)
    monkeypatch.setattr(module, "RETRY_AFTER_BUG_S", 0.1)
    fleet.h1.may_copy.set()
    async with fleet.led_by(await lead()) as conductor:
        await conductor.create(move("web", "m1"))
        await fleet.is_in("m1", State.DONE)
        await conductor.create(move("db", "m2"))
        await conductor.create(move("mail", "m3", to="h2"))
        assert state_of(await fleet.reader.migration("m2")) is State.PLANNED

        monkeypatch.setattr(Driver, "run", real)
        await fleet.is_in("m2", State.DONE)
        await fleet.is_in("m3", State.DONE)


async def test_a_record_that_can_not_be_driven_stops_no_other(fleet: Fleet, lead: Lead, client: EtcdClient) -> None:
    of_another_release = migration("m0", uuid=WEB)
    of_another_release.state = MigrationState.MIGRATION_STATE_UNSPECIFIED
    to_an_unknown_host = migration("m1", "h1", "nowhere", State.COPYING, uuid=DB)
    for record in (of_another_release, to_an_unknown_host):
        await client.txn([], [put(MIGRATIONS + record.id, encode(record))])
    fleet.h1.may_copy.set()

    async with fleet.led_by(await lead()) as conductor:
        await conductor.create(move("mail", "m2"))
        await fleet.is_in("m2", State.DONE)

    assert state_of(await fleet.reader.migration("m1")) is State.COPYING
