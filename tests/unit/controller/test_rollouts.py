"""Rollouts by a real leader's work on a real etcd, over an agent that is quick and honest."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest
from etcd_cluster import until
from instant_agents import InstantAgent, InstantAgents
from leading import Lead
from records import domain

from handoff.agent.v1.host_pb2 import Emulator, Host, Slot
from handoff.agent.v1.qemu_pb2 import Handoff, HandoffRole, HandoffState, SourceGuest, TransferMethod
from handoff.agent.v1.types_pb2 import Domain, DomainState, Fence
from handoff.controller.v1.rollouts_pb2 import CreateRolloutRequest, Rollout
from handoff_common.errors import InvalidArgumentError, NotFoundError, PreconditionError
from handoff_controller.agents import Agents
from handoff_controller.conductor import Conductor
from handoff_controller.etcd.client import EtcdClient
from handoff_controller.etcd.election import Leadership
from handoff_controller.machine import State, state_of
from handoff_controller.rollout import Phase, Turn, phase_of, turn_of
from handoff_controller.settings import ControllerSettings, EtcdSettings
from handoff_controller.store import Reader

NAMES = ("db", "mail", "web")


def a_guest(name: str, build: str = "old") -> Domain:
    made = domain(f"uuid-{name}", name)
    made.emulator_name = build
    return made


class UpgradingAgent(InstantAgent):
    """A host with two slots and two builds; both sides of a handoff are its own."""

    def __init__(self, *guests: Domain) -> None:
        super().__init__("h1", guests)
        self.refuses: set[str] = set()
        """Names of guests that can't be upgraded."""
        self.fails: set[str] = set()
        """Names of guests whose new QEMU does not start."""

    async def get_host(self) -> Host:
        return Host(
            name=self.name,
            slots=[Slot(name=name, connected=True) for name in ("a", "b")],
            emulators=[Emulator(name="new", release="10.0.2"), Emulator(name="old", release="7.2.22")],
        )

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
        if domain_uuid.removeprefix("uuid-") in self.refuses:
            raise PreconditionError("it uses a device of this host; detach it")
        return await super().prepare_source(fence, migration_id, domain_uuid, validate_only=validate_only, local=local)

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
        if guest.domain.name in self.fails and not validate_only:
            raise PreconditionError("its QEMU ended")
        handoff = await super().prepare_destination(
            fence, migration_id, guest, slot, validate_only=validate_only, method=method, emulator=emulator
        )
        if not validate_only:
            moved = Domain()
            moved.CopyFrom(guest.domain)
            moved.slot, moved.emulator_name = slot, emulator
            self._moving[migration_id] = moved
        return handoff

    async def release_source(self, fence: Fence, migration_id: str, *, keep_disks: bool = False) -> Handoff:
        return await self._do(
            "release_source", migration_id, HandoffRole.HANDOFF_ROLE_SOURCE, HandoffState.HANDOFF_STATE_RELEASED
        )

    def begun(self) -> list[str]:
        """Ids of the upgrades that were begun, in order."""
        return [migration_id for call, migration_id in self.calls if call == "prepare_source"]


class Leaders:
    """The host, and whoever leads."""

    def __init__(self, client: EtcdClient) -> None:
        self.agent = UpgradingAgent(*(a_guest(name) for name in NAMES))
        self.reader = Reader(client)
        self._client = client

    @asynccontextmanager
    async def led_by(self, leadership: Leadership) -> AsyncIterator[Conductor]:
        settings = ControllerSettings(
            name="c",
            advertise="127.0.0.1:1",
            etcd=EtcdSettings(endpoints=("127.0.0.1:1",)),
            hosts={"h1": "h1:7701"},
        )
        agents = cast(Agents, InstantAgents([self.agent]))
        conductor = Conductor(self._client, leadership, agents, settings)
        work = asyncio.create_task(conductor.run())
        try:
            yield conductor
        finally:
            work.cancel()
            await asyncio.wait({work})

    async def ends(self, rollout_id: str, phase: Phase) -> Rollout:
        async def there() -> bool:
            return phase_of(await self.reader.rollout(rollout_id)) is phase

        await until(there, 20)
        return await self.reader.rollout(rollout_id)

    async def begins(self, *migration_ids: str) -> None:
        async def there() -> bool:
            return self.agent.begun() == list(migration_ids)

        await until(there, 10)


@pytest.fixture
def leaders(client: EtcdClient, empty: None) -> Leaders:
    return Leaders(client)


def request(*, parallel: int = 0, keep_going: bool = False, release: str = "new") -> CreateRolloutRequest:
    return CreateRolloutRequest(host="h1", release=release, parallel=parallel, keep_going=keep_going, request_id="r1")


def turns(rollout: Rollout) -> list[Turn]:
    return [turn_of(guest) for guest in rollout.guests]


async def test_one_after_the_other_gets_the_release(leaders: Leaders, lead: Lead) -> None:
    leaders.agent.may_copy.set()
    async with leaders.led_by(await lead()) as conductor:
        created = await conductor.rollouts.create(request())
        assert (created.release, created.parallel, [guest.name for guest in created.guests]) == ("new", 1, list(NAMES))
        done = await leaders.ends("r1", Phase.DONE)
        assert await conductor.rollouts.create(request()) == done

    assert turns(done) == [Turn.UPGRADED] * 3
    assert leaders.agent.begun() == ["r1-g1", "r1-g2", "r1-g3"]
    assert {one.emulator_name for one in await leaders.agent.list_domains()} == {"new"}


async def test_no_more_than_asked_for_at_one_time(leaders: Leaders, lead: Lead) -> None:
    async with leaders.led_by(await lead()) as conductor:
        await conductor.rollouts.create(request(parallel=2))

        async def two_are_asked_for() -> bool:
            return [one.id for one in await leaders.reader.migrations()] == ["r1-g1", "r1-g2"]

        await until(two_are_asked_for, 10)
        assert turns(await leaders.reader.rollout("r1")) == [Turn.UPGRADING, Turn.UPGRADING, Turn.PENDING]
        leaders.agent.may_copy.set()
        done = await leaders.ends("r1", Phase.DONE)

    assert turns(done) == [Turn.UPGRADED] * 3


async def test_the_first_failure_stops_it(leaders: Leaders, lead: Lead) -> None:
    leaders.agent.may_copy.set()
    leaders.agent.fails = {"mail"}
    async with leaders.led_by(await lead()) as conductor:
        await conductor.rollouts.create(request())
        failed = await leaders.ends("r1", Phase.FAILED)

    assert turns(failed) == [Turn.UPGRADED, Turn.FAILED, Turn.PENDING]
    assert "mail failed" in failed.reason
    assert "its QEMU ended" in failed.guests[1].reason


async def test_told_to_keep_going_it_does(leaders: Leaders, lead: Lead) -> None:
    leaders.agent.may_copy.set()
    leaders.agent.refuses = {"db"}
    async with leaders.led_by(await lead()) as conductor:
        await conductor.rollouts.create(request(keep_going=True))
        failed = await leaders.ends("r1", Phase.FAILED)

    assert turns(failed) == [Turn.FAILED, Turn.UPGRADED, Turn.UPGRADED]
    assert "a device of this host" in failed.guests[0].reason


async def test_a_cancel_lets_what_is_under_way_finish(leaders: Leaders, lead: Lead) -> None:
    async with leaders.led_by(await lead()) as conductor:
        await conductor.rollouts.create(request())
        await leaders.begins("r1-g1")
        await conductor.rollouts.cancel("r1")
        leaders.agent.may_copy.set()
        cancelled = await leaders.ends("r1", Phase.CANCELLED)
        with pytest.raises(PreconditionError, match="is CANCELLED already"):
            await conductor.rollouts.cancel("r1")

    assert turns(cancelled) == [Turn.UPGRADED, Turn.PENDING, Turn.PENDING]


async def test_a_new_leader_goes_on(leaders: Leaders, lead: Lead) -> None:
    async with leaders.led_by(await lead()) as conductor:
        await conductor.rollouts.create(request())
        await leaders.begins("r1-g1")
    leaders.agent.may_copy.set()
    async with leaders.led_by(await lead()):
        done = await leaders.ends("r1", Phase.DONE)

    assert turns(done) == [Turn.UPGRADED] * 3
    migrations = await leaders.reader.migrations()
    assert sorted(one.id for one in migrations) == ["r1-g1", "r1-g2", "r1-g3"]
    assert {state_of(one) for one in migrations} == {State.DONE}


async def test_what_has_it_already_or_is_off_is_left_alone(leaders: Leaders, lead: Lead) -> None:
    off = a_guest("web")
    off.state = DomainState.DOMAIN_STATE_SHUT_OFF
    leaders.agent = UpgradingAgent(a_guest("db", "new"), a_guest("mail"), off)
    leaders.agent.may_copy.set()
    async with leaders.led_by(await lead()) as conductor:
        await conductor.rollouts.create(request())
        done = await leaders.ends("r1", Phase.DONE)

    assert [(guest.name, turn_of(guest)) for guest in done.guests] == [("db", Turn.SKIPPED), ("mail", Turn.UPGRADED)]
    assert "already" in done.guests[0].reason


async def test_what_can_not_be_asked_for(leaders: Leaders, lead: Lead) -> None:
    async with leaders.led_by(await lead()) as conductor:
        with pytest.raises(NotFoundError, match=r"no QEMU build 9\.9"):
            await conductor.rollouts.create(request(release="9.9"))
        with pytest.raises(NotFoundError, match="no host"):
            await conductor.rollouts.create(CreateRolloutRequest(host="h9"))
        for wrong in (
            CreateRolloutRequest(),
            CreateRolloutRequest(host="h1", parallel=17),
            CreateRolloutRequest(host="h1", request_id="no spaces"),
            CreateRolloutRequest(host="h1", request_id="x" * 57),
        ):
            with pytest.raises(InvalidArgumentError):
                await conductor.rollouts.create(wrong)
        await conductor.rollouts.create(request())
        with pytest.raises(PreconditionError, match="rollout r1 is at work on h1"):
            await conductor.rollouts.create(CreateRolloutRequest(host="h1", request_id="r2"))
    assert await leaders.reader.find_rollout("r2") is None
