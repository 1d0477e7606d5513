"""What an operator is told and may decide when a committed guest can't be run, on a real etcd."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
from etcd_cluster import until
from instant_agents import InstantAgent, InstantAgents
from leading import Lead
from records import domain, migration, place

from handoff.controller.v1.migrations_pb2 import (
    CreateMigrationRequest,
    Migration,
    RecoverMigrationRequest,
    RecoveryTarget,
)
from handoff_common.errors import InvalidArgumentError, PreconditionError, UnavailableError
from handoff_controller import conductor as conductor_module
from handoff_controller import disks, forward, standstill, undo
from handoff_controller.agents import Agents
from handoff_controller.conductor import Conductor
from handoff_controller.etcd.client import EtcdClient
from handoff_controller.etcd.txn import put
from handoff_controller.machine import State, state_of
from handoff_controller.settings import ControllerSettings, EtcdSettings, FencingSettings, RetentionSettings
from handoff_controller.store import MIGRATIONS, Reader, encode

WEB = "uuid-web"
SOURCE = RecoveryTarget.RECOVERY_TARGET_SOURCE
DESTINATION = RecoveryTarget.RECOVERY_TARGET_DESTINATION
OPERATOR = "alice@adm1"


class Fleet:
    """A guest on h1 that is being moved to h2."""

    def __init__(self, client: EtcdClient, lead: Lead, folder: Path) -> None:
        self.h1, self.h2 = InstantAgent("h1", [domain(WEB, "web")]), InstantAgent("h2")
        self.h1.may_copy.set()
        self.reader = Reader(client)
        self.fenced = folder / "fenced"
        self.fencing = FencingSettings()
        self.keep = RetentionSettings()
        self._client, self._lead = client, lead

    def has_fence_command(self, *, automatic_after_s: float = 0.0, status: int = 0) -> None:
        script = f"echo $1 >> {self.fenced}; exit {status}"
        self.fencing = FencingSettings(
            command=("/bin/sh", "-c", script, "fence", "{host}"), automatic_after_s=automatic_after_s
        )

    @asynccontextmanager
    async def led(self) -> AsyncIterator[Conductor]:
        settings = ControllerSettings(
            name="ctl1",
            advertise="127.0.0.1:1",
            etcd=EtcdSettings(endpoints=("127.0.0.1:1",)),
            hosts={name: f"{name}:7701" for name in ("h1", "h2")},
            fencing=self.fencing,
            keep_migrations=self.keep,
        )
        agents = cast(Agents, InstantAgents([self.h1, self.h2]))
        conductor = Conductor(self._client, await self._lead(), agents, settings)
        work = asyncio.create_task(conductor.run())
        try:
            yield conductor
        finally:
            work.cancel()
            await asyncio.wait({work})

    async def comes_to(self, holds: Callable[[Migration], bool]) -> Migration:
        async def there() -> bool:
            return holds(await self.reader.migration("m1"))

        await until(there, 15)
        return await self.reader.migration("m1")

    async def stands_still(self, conductor: Conductor) -> Migration:
        """The move, committed and in need of a decision."""
        await conductor.create(CreateMigrationRequest(guest="web", destination_host="h2", request_id="m1"))
        found = await self.comes_to(lambda one: bool(one.needs_decision))
        assert state_of(found) is State.COMMITTED
        return found

    async def ends(self) -> Migration:
        return await self.comes_to(lambda one: state_of(one) in (State.DONE, State.ABORTED))


@pytest.fixture
def fleet(client: EtcdClient, lead: Lead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    for module in (forward, undo):
        monkeypatch.setattr(module, "DECISION_AFTER_S", 0.2)
    monkeypatch.setattr(forward, "LOOK_S", 0.1)
    monkeypatch.setattr(standstill, "ORDER_LIFE_S", 0.5)
    monkeypatch.setattr(forward, "FINISHING_PATIENCE_S", 0.2)
    monkeypatch.setattr(undo, "DESTINATION_PATIENCE_S", 0.2)
    monkeypatch.setattr(undo, "LOOK_S", 0.1)
    monkeypatch.setattr(disks, "PATIENCE_S", 0.2)
    monkeypatch.setattr(disks, "LOOK_S", 0.1)
    return Fleet(client, lead, tmp_path)


def recover(
    target: "RecoveryTarget.ValueType" = SOURCE, *, fenced: str = "", lossy: bool = False
) -> RecoverMigrationRequest:
    return RecoverMigrationRequest(id="m1", target=target, fenced_host=fenced, accept_loss=lossy, by=OPERATOR)


async def test_a_silent_destination_is_left_to_the_operator(fleet: Fleet) -> None:
    fleet.h2.away_from_activate = {"activate", "watch"}
    async with fleet.led() as conductor:
        waiting = await fleet.stands_still(conductor)
        guest = await fleet.reader.guest("web")
        with pytest.raises(PreconditionError, match="--i-have-fenced h2"):
            await conductor.recover(recover())

        fleet.h2.away_from_activate = set()
        fleet.h2.away = set()
        done = await fleet.ends()

    assert "held on h1" in waiting.needs_decision
    assert "handoff recover m1 --to source --i-have-fenced h2" in waiting.needs_decision
    assert guest.owner == place("h2")
    assert (state_of(done), done.needs_decision) == (State.DONE, "")
    assert ("abort", "m1") not in fleet.h1.calls


async def test_back_to_the_source_by_the_operators_word(fleet: Fleet) -> None:
    fleet.h2.away_from_activate = {"activate", "watch", "abort", "fence"}
    async with fleet.led() as conductor:
        await fleet.stands_still(conductor)
        with pytest.raises(InvalidArgumentError, match="on h2, not on h1"):
            await conductor.recover(recover(fenced="h1"))
        taken = await conductor.recover(recover(fenced="h2"))
        again = await conductor.recover(recover(fenced="h2"))
        aborted = await fleet.ends()
        guest = await fleet.reader.guest("web")

    assert state_of(taken) in (State.ABORTING, State.ABORTED)
    assert again.id == "m1"
    assert aborted.recovery.fenced_host == "h2"
    line = next(change for change in aborted.timeline if change.state == State.ABORTING.value)
    assert "h2 is fenced, by the word of alice@adm1" in line.reason
    assert guest.owner == place("h1")
    assert guest.generation == 3
    assert ("abort", "m1") in fleet.h1.calls


async def test_a_fence_that_has_no_part_in_the_decision_is_refused_and_nothing_is_touched(fleet: Fleet) -> None:
    fleet.h2.away_from_activate = {"activate", "watch"}
    async with fleet.led() as conductor:
        before = await fleet.stands_still(conductor)
        for fenced, why in (
            ("h2", "can't go on at h2 when h2 is off.*--to source --i-have-fenced h2"),
            ("h1", "whether h1 is off makes no difference yet.*`handoff recover m1 --to destination`"),
            ("h9", "h9 has no part in migration m1, which is from h1 to h2"),
        ):
            for lossy in (False, True):
                with pytest.raises(InvalidArgumentError, match=why):
                    await conductor.recover(recover(DESTINATION, fenced=fenced, lossy=lossy))
        after = await fleet.reader.migration("m1")
        await conductor.recover(recover(DESTINATION))
        waiting = await fleet.reader.migration("m1")

    assert not after.HasField("recovery")
    assert after.needs_decision == before.needs_decision
    assert waiting.recovery.target == DESTINATION


async def test_an_agent_that_answers_is_not_fenced(fleet: Fleet) -> None:
    fleet.has_fence_command()
    fleet.h2.away = {"activate"}
    async with fleet.led() as conductor:
        await fleet.stands_still(conductor)
        for request in (recover(), recover(fenced="h2")):
            with pytest.raises(PreconditionError, match="h2 is not off: its agent answers"):
                await conductor.recover(request)

    assert not fleet.fenced.exists()


async def test_back_to_the_source_by_the_fence_command(fleet: Fleet) -> None:
    fleet.has_fence_command()
    fleet.h2.away_from_activate = {"activate", "watch", "abort", "fence"}
    async with fleet.led() as conductor:
        waiting = await fleet.stands_still(conductor)
        await conductor.recover(recover())
        aborted = await fleet.ends()

    assert fleet.fenced.read_text() == "h2\n"
    assert "fences h2" in waiting.needs_decision
    assert "h2 was fenced by /bin/sh" in aborted.error


async def test_a_fence_that_fails_changes_nothing(fleet: Fleet) -> None:
    fleet.has_fence_command(status=1)
    fleet.h2.away_from_activate = {"activate", "watch"}
    async with fleet.led() as conductor:
        await fleet.stands_still(conductor)
        with pytest.raises(PreconditionError, match="h2 is not fenced"):
            await conductor.recover(recover())
        assert state_of(await fleet.reader.migration("m1")) is State.COMMITTED


async def test_fenced_unasked_after_a_while_if_so_configured(fleet: Fleet) -> None:
    fleet.has_fence_command(automatic_after_s=0.5)
    fleet.h2.away_from_activate = {"activate", "watch", "abort", "fence"}
    async with fleet.led() as conductor:
        await fleet.stands_still(conductor)
        aborted = await fleet.ends()

    assert (state_of(aborted), aborted.recovery.by) == (State.ABORTED, "controller ctl1")


async def test_who_decides_to_wait_is_not_overruled_by_the_fence(fleet: Fleet) -> None:
    fleet.has_fence_command(automatic_after_s=2.0)
    fleet.h2.away_from_activate = {"activate", "watch"}
    async with fleet.led() as conductor:
        await fleet.stands_still(conductor)
        waits = await conductor.recover(recover(DESTINATION))
        await asyncio.sleep(2.5)
        fleet.h2.away_from_activate = set()
        fleet.h2.away = set()
        done = await fleet.ends()

    assert state_of(waits) is State.COMMITTED
    assert state_of(done) is State.DONE
    assert not fleet.fenced.exists()
    assert "alice@adm1 decided to wait for h2" in [change.reason for change in done.timeline]


async def test_a_guest_that_ended_as_it_was_resumed_is_not_run_from_its_past_unasked(fleet: Fleet) -> None:
    fleet.h2.ends_as_resumed = True
    async with fleet.led() as conductor:
        waiting = await fleet.stands_still(conductor)
        with pytest.raises(PreconditionError, match="--accept-loss"):
            await conductor.recover(recover())
        await conductor.recover(recover(lossy=True))
        aborted = await fleet.ends()

    assert "may have run" in waiting.needs_decision
    assert state_of(aborted) is State.ABORTED
    assert ("abort", "m1") in fleet.h2.calls


async def test_a_guest_that_is_left_to_its_destination_is_lost(fleet: Fleet) -> None:
    fleet.h2.ends_as_resumed = True
    async with fleet.led() as conductor:
        await fleet.stands_still(conductor)
        await conductor.recover(recover(DESTINATION, lossy=True))
        done = await fleet.ends()
        guest = await fleet.reader.guest("web")

    assert state_of(done) is State.DONE
    assert (done.loss.host, done.loss.certain) == ("h2", True)
    assert ("release_source", "m1") in fleet.h1.calls
    assert guest.owner == place("h2")


async def test_a_destination_that_dies_after_the_guest_ran(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "FINISHING_PATIENCE_S", 2.0)  # it is seen to be FINISHING before that is over
    fleet.h2.away = {"finalize_destination"}
    async with fleet.led() as conductor:
        await conductor.create(CreateMigrationRequest(guest="web", destination_host="h2", request_id="m1"))
        await fleet.comes_to(lambda one: state_of(one) is State.FINISHING)
        fleet.h2.away = {"all"}
        done = await fleet.ends()

    assert state_of(done) is State.DONE
    assert (done.loss.host, done.loss.certain) == ("h2", False)
    assert "has not answered since" in done.loss.reason


async def test_a_source_that_is_gone_for_good_is_given_up(fleet: Fleet) -> None:
    fleet.h1.away = {"switch_over", "abort"}
    async with fleet.led() as conductor:
        await conductor.create(CreateMigrationRequest(guest="web", destination_host="h2", request_id="m1"))
        waiting = await fleet.comes_to(lambda one: bool(one.needs_decision))
        with pytest.raises(PreconditionError, match="must not run"):
            await conductor.recover(recover(DESTINATION))
        with pytest.raises(PreconditionError, match="--i-have-fenced h1 --accept-loss"):
            await conductor.recover(recover(fenced="h1"))
        fleet.h1.away |= {"watch"}
        with pytest.raises(InvalidArgumentError, match="h11 has no part in migration m1, which is from h1 to h2"):
            await conductor.recover(recover(fenced="h11", lossy=True))
        await conductor.recover(recover(fenced="h1", lossy=True))
        aborted = await fleet.ends()

    assert state_of(waiting) is State.ABORTING
    assert (state_of(aborted), aborted.loss.host, aborted.loss.certain) == (State.ABORTED, "h1", True)


async def test_a_source_that_answers_is_neither_given_up_nor_fenced(fleet: Fleet) -> None:
    fleet.has_fence_command()
    fleet.h1.away = {"switch_over", "abort"}
    async with fleet.led() as conductor:
        await conductor.create(CreateMigrationRequest(guest="web", destination_host="h2", request_id="m1"))
        await fleet.comes_to(lambda one: bool(one.needs_decision))
        for request in (recover(lossy=True), recover(fenced="h1", lossy=True)):
            with pytest.raises(PreconditionError, match="h1 is not off: its agent answers"):
                await conductor.recover(request)
        fleet.h1.away = set()
        aborted = await fleet.ends()

    assert not fleet.fenced.exists()
    assert (state_of(aborted), aborted.HasField("loss")) == (State.ABORTED, False)


async def pulls(fleet: Fleet, conductor: Conductor) -> None:
    """The guest runs at the destination, which still needs the source's disks."""
    fleet.h2.pulls = True
    await conductor.create(CreateMigrationRequest(guest="web", destination_host="h2", request_id="m1"))
    await fleet.comes_to(lambda one: state_of(one) is State.FINISHING)


async def test_a_destination_that_is_silent_while_it_pulls_is_waited_for(fleet: Fleet) -> None:
    async with fleet.led() as conductor:
        await pulls(fleet, conductor)
        fleet.h2.away = {"all"}
        await fleet.h2.has_pulled()
        waiting = await fleet.comes_to(lambda one: bool(one.needs_decision))
        with pytest.raises(PreconditionError, match="Say --accept-loss"):
            await conductor.recover(recover(fenced="h2"))
        with pytest.raises(PreconditionError, match="by itself, however long"):
            await conductor.recover(recover(DESTINATION))
        with pytest.raises(PreconditionError, match="no fence command"):
            await conductor.recover(recover(lossy=True))
        fleet.h2.away = set()
        done = await fleet.ends()

    assert state_of(waiting) is State.FINISHING
    assert "handoff recover m1 --to source --i-have-fenced h2 --accept-loss" in waiting.needs_decision
    assert (state_of(done), done.needs_decision, done.disks_arrived) == (State.DONE, "", True)
    assert list(done.warnings) == []
    assert ("release_source", "m1") in fleet.h1.calls


async def test_a_guest_whose_destination_dies_while_it_pulls_goes_on_from_the_switch(fleet: Fleet) -> None:
    async with fleet.led() as conductor:
        await pulls(fleet, conductor)
        with pytest.raises(PreconditionError, match="h2 is not off: its agent answers"):
            await conductor.recover(recover(fenced="h2", lossy=True))
        fleet.h2.away = {"all"}
        await conductor.recover(recover(fenced="h2", lossy=True))
        aborted = await fleet.ends()
        guest = await fleet.reader.guest("web")

    assert (state_of(aborted), aborted.recovery.fenced_host) == (State.ABORTED, "h2")
    assert "h2 did not answer while it pulled the disks of web; h2 is fenced" in aborted.error
    assert guest.owner == place("h1")
    assert ("abort", "m1") in fleet.h1.calls
    assert ("release_source", "m1") not in fleet.h1.calls


async def test_a_source_that_dies_while_its_disks_are_pulled_keeps_them(fleet: Fleet) -> None:
    async with fleet.led() as conductor:
        await pulls(fleet, conductor)
        with pytest.raises(PreconditionError, match="h1 answers"):
            await conductor.recover(recover(DESTINATION, fenced="h1", lossy=True))
        with pytest.raises(InvalidArgumentError, match="can't go on at h2 when h2 is off"):
            await conductor.recover(recover(DESTINATION, fenced="h2", lossy=True))
        fleet.h1.away = {"all"}
        await conductor.recover(recover(DESTINATION, fenced="h1", lossy=True))
        done = await fleet.ends()

    assert state_of(done) is State.DONE
    assert done.options.keep_source_disks
    assert any("still pulled vda from it: web is not whole" in warning for warning in done.warnings)
    assert ("finalize_destination", "m1") in fleet.h2.calls


async def test_there_is_nothing_to_decide_before_the_commit_nor_after_the_end(fleet: Fleet) -> None:
    fleet.h1.may_copy.clear()
    async with fleet.led() as conductor:
        await conductor.create(CreateMigrationRequest(guest="web", destination_host="h2", request_id="m1"))
        await fleet.comes_to(lambda one: state_of(one) is State.COPYING)
        with pytest.raises(PreconditionError, match="COPYING: nothing is to be decided"):
            await conductor.recover(recover(fenced="h2"))
        fleet.h1.may_copy.set()
        await fleet.ends()
        with pytest.raises(PreconditionError, match="DONE already"):
            await conductor.recover(recover(fenced="h2"))


async def test_a_migration_whose_host_is_not_configured_says_so(fleet: Fleet, client: EtcdClient) -> None:
    async with fleet.led():

        async def seen() -> bool:
            return len(await fleet.reader.guests()) == 1

        await until(seen, 5)
    record = migration("m1", "h1", "nowhere", State.COMMITTED, uuid=WEB)
    await client.txn([], [put(MIGRATIONS + record.id, encode(record))])

    async with fleet.led() as conductor:
        waiting = await fleet.comes_to(lambda one: bool(one.waiting_for))
        with pytest.raises(UnavailableError, match="nowhere to be in the controllers' configuration"):
            await conductor.recover(recover(fenced="nowhere"))

    assert "nowhere" in waiting.waiting_for


async def test_a_taken_request_id_is_refused(fleet: Fleet) -> None:
    async with fleet.led() as conductor:
        await conductor.create(CreateMigrationRequest(guest="web", destination_host="h2", request_id="m1"))
        await fleet.ends()
        for other in (("db", "h2"), ("web", "h1")):
            request = CreateMigrationRequest(guest=other[0], destination_host=other[1], request_id="m1")
            with pytest.raises(InvalidArgumentError, match="m1 is taken by the migration of web to h2"):
                await conductor.create(request)


async def test_old_migrations_are_forgotten(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conductor_module, "FORGET_EVERY_S", 0.2)
    fleet.keep = RetentionSettings(count=0, age_s=0.5)

    async def gone() -> bool:
        return not await fleet.reader.migrations()

    async with fleet.led() as conductor:
        await conductor.create(CreateMigrationRequest(guest="web", destination_host="h2", request_id="m1"))
        await until(gone, 10)
        assert (await fleet.reader.guest("web")).owner == place("h2")
