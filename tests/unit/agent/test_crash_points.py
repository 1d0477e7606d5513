"""An agent dies before or after each write of its ledger; one copy runs in the end, and never two at once.

Real agents, libvirtds and QEMUs, killed by SIGKILL, and the controllers' own driver, which retries, aborts or commits
by what it is told. `make unit` runs what is about the switch, `make crash-points` all (docs/soak.md).
"""

import asyncio
import contextlib
import os
import signal
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

import libvirt
import pytest
from builds import QEMU, Builds
from mortals import FENCE, Leader, MortalAgent, Runs
from one_host import remove_all
from ports import port
from processes import incoming_qemu

from handoff.agent.v1 import qemu_pb2 as pb
from handoff.controller.v1.migrations_pb2 import Migration, MigrationKind, MigrationOptions, Placement
from handoff_agent.monitor import Monitor
from handoff_agent.slots import Hypervisor, Slot
from handoff_controller.machine import State, enter, state_of
from handoff_controller.planner import with_defaults

MEMORY_MIB = 128


class Way(Enum):
    """How a handoff goes when nobody dies."""

    MOVED = "moved"
    BROKEN_OFF = "broken-off"
    """The same, but an agent that dies finds its bridge gone, and breaks off a switch that is not over."""
    CANCELLED = "cancelled"
    """When it is HELD."""
    TAKEN_BACK = "taken-back"
    """The destination's QEMU dies at the commit, and its agent says so."""
    COPIED = "copied"
    """To another slot of the host, whose agent has both sides."""
    PASSED_ON = "passed-on"
    """The same, by descriptor."""

    @property
    def is_local(self) -> bool:
        return self in (Way.COPIED, Way.PASSED_ON)


# What is written on the way to the commit.
_TO_HELD = (
    "source PREPARED.1",
    "destination PREPARED.1",
    "destination PREPARED.2",
    "source TRANSFERRING.1",
    "source READY.1",
    "source SWITCHING.1",
    "source HELD.1",
    "source HELD.2",
)
_MOVED = (
    *_TO_HELD,
    "destination PREPARED.3",
    "destination ACTIVE.1",
    "destination FINALIZED.1",
    "source HELD.3",
    "source RELEASED.1",
)
WRITES: Mapping[Way, Sequence[str]] = {
    Way.MOVED: _MOVED,
    Way.BROKEN_OFF: _MOVED,
    Way.CANCELLED: (*_TO_HELD, "destination PREPARED.3", "destination ABORTED.1", "source ABORTED.1"),
    Way.TAKEN_BACK: (
        *_TO_HELD,
        "destination FAILED.1",
        "destination FAILED.2",
        "destination ABORTED.1",
        "source ABORTED.1",
    ),
    Way.COPIED: _MOVED,
    Way.PASSED_ON: _MOVED,
}

# About the switch, where two copies could come to run.
USUAL = {
    "moved-source-PREPARED.1-after",
    "moved-source-SWITCHING.1-before",
    "broken-off-source-HELD.1-before",
    "moved-source-HELD.1-after",
    "moved-destination-PREPARED.3-before",
    "moved-destination-PREPARED.3-after",
    "moved-destination-ACTIVE.1-before",
    "taken-back-source-ABORTED.1-before",
}
DEATHS = {
    f"{way.value}-{write.replace(' ', '-')}-{moment}": (way, f"{write} {moment}")
    for way, writes in WRITES.items()
    for write in writes
    for moment in ("before", "after")
}


class Fleet:
    """Agents of two hosts with one slot each, and one of both slots, on the same two libvirtds."""

    def __init__(self, uris: tuple[str, str], builds: Builds, directory: Path) -> None:
        self.slots = {name: Slot(name, uri) for name, uri in zip("ab", uris, strict=True)}
        self.hypervisor = Hypervisor(list(self.slots.values()))
        first, second = uris
        h1 = MortalAgent("h1", {"a": first}, builds, directory / "h1", port(48))
        h2 = MortalAgent("h2", {"a": second}, builds, directory / "h2", port(64))
        h3 = MortalAgent("h3", {"a": first, "b": second}, builds, directory / "h3", port(80))
        self._sides = {way: (h3, h3) if way.is_local else (h1, h2) for way in Way}
        self._living: set[MortalAgent] = set()
        self._stack = contextlib.AsyncExitStack()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Fleet"]:
        async with self.hypervisor.running(), self._stack:
            for slot in self.slots.values():
                assert await slot.wait_connected(60)  # libvirtd looks at every QEMU first
            yield self

    async def sides(self, way: Way) -> tuple[MortalAgent, MortalAgent]:
        """The agents of source and destination."""
        for agent in self._sides[way]:
            if agent not in self._living:
                self._living.add(agent)
                await self._stack.enter_async_context(agent.living())
            await agent.serves()
        return self._sides[way]


@pytest.fixture(scope="module")
async def fleet(
    libvirtd: str, other_libvirtd: str, builds: Builds, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Fleet]:
    async with Fleet((libvirtd, other_libvirtd), builds, tmp_path_factory.mktemp("fleet")).running() as made:
        yield made


class Move:
    """A guest that runs in slot a, and its way to slot b."""

    def __init__(self, fleet: Fleet, way: Way, sides: tuple[MortalAgent, MortalAgent]) -> None:
        self.fleet, self.way = fleet, way
        self.source, self.destination = sides
        self.guest, self.id = str(uuid.uuid4()), f"m-{uuid.uuid4().hex[:8]}"
        self.autostart_at_commit: int | None = None

    def define(self, connection: libvirt.virConnect) -> None:
        passable = self.way is Way.PASSED_ON
        backing = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>" if passable else ""
        extra = "<qemu:arg value='-machine'/><qemu:arg value='aux-ram-share=on'/>" if passable else ""
        domain = connection.defineXML(
            f"""<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
            <name>g-{self.guest[:6]}</name><uuid>{self.guest}</uuid><memory unit='MiB'>{MEMORY_MIB}</memory>{backing}
            <vcpu>1</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features><devices>
            <emulator>{QEMU}</emulator></devices><qemu:commandline>{extra}</qemu:commandline></domain>"""
        )
        domain.setAutostart(1)
        domain.create()

    async def run(self) -> Migration:
        """To the end."""
        now = datetime.now(UTC)
        migration = Migration(
            id=self.id,
            guest_uuid=self.guest,
            guest_name=f"g-{self.guest[:6]}",
            source=Placement(host="s", slot="a"),
            destination=Placement(host="d", slot="b" if self.way.is_local else "a"),
            options=with_defaults(MigrationOptions()),
            kind=MigrationKind.MIGRATION_KIND_MOVE,
            method=pb.TRANSFER_METHOD_TCP,
        )
        migration.create_time.FromDatetime(now)
        if self.way.is_local:
            migration.kind, migration.release = MigrationKind.MIGRATION_KIND_UPGRADE, "new"
            migration.method = pb.TRANSFER_METHOD_CPR if self.way is Way.PASSED_ON else pb.TRANSFER_METHOD_UNIX
        migration = enter(migration, State.PLANNED, at=now, term=FENCE.term)
        cancels = self.way is Way.CANCELLED
        async with asyncio.timeout(90):
            return await Leader(migration, self.source, self.destination, self._entered, cancels=cancels).run()

    async def _entered(self, state: State) -> None:
        if state is not State.COMMITTED:
            return
        self.autostart_at_commit = await self.fleet.slots["a"].on_domain(self.guest, lambda domain: domain.autostart())
        if self.way is Way.TAKEN_BACK:
            os.kill(incoming_qemu(self.guest), signal.SIGKILL)
            await self.destination.notes(self.id, "destination FAILED.1")

    async def statuses(self) -> dict[str, str]:
        """By slot, how each QEMU of the guest is."""
        found = {}
        for name, slot in self.fleet.slots.items():
            if self.guest in await slot.call(_uuids):
                found[name] = await Monitor(slot, self.guest).query_status()
        return found


def _uuids(connection: libvirt.virConnect) -> list[str]:
    return [domain.UUIDString() for domain in connection.listAllDomains()]


@pytest.fixture
async def move(fleet: Fleet, way: Way) -> AsyncIterator[Move]:
    made = Move(fleet, way, await fleet.sides(way))
    await fleet.slots["a"].call(made.define)
    yield made
    await remove_all(fleet.hypervisor)
    for agent in (made.source, made.destination):
        agent.forget()


async def ends_well(move: Move) -> Migration:
    """One copy runs, never two did, all is settled, and nothing is left."""
    with move.fleet.slots["a"].events(move.guest) as left, move.fleet.slots["b"].events(move.guest) as arrived:
        ended = await move.run()
        home = "b" if state_of(ended) is State.DONE else "a"
        assert await move.statuses() == {home: "running"}, ended
        here, there = await Runs(left, began=0.0).all(), await Runs(arrived).all()
    assert not [(one, other) for one in here for other in there if one[0] < other[1] and other[0] < one[1]]
    assert move.autostart_at_commit in (None, 0)
    assert await move.fleet.slots[home].on_domain(move.guest, lambda domain: domain.autostart()) == 1
    for agent in {move.source, move.destination}:
        assert await agent.unsettled(move.id) == []
        assert agent.leftovers() == []
    return ended


@pytest.mark.parametrize("way", Way, ids=lambda way: way.value)
async def test_every_write_is_known(move: Move, way: Way) -> None:
    ended = await ends_well(move)
    assert state_of(ended) is (State.ABORTED if way in (Way.CANCELLED, Way.TAKEN_BACK) else State.DONE)
    written = [write for agent in {move.source, move.destination} for write in agent.writes(move.id)]
    assert sorted(written) == sorted(WRITES[way])


def test_the_usual_ones_are_among_all() -> None:
    assert set(DEATHS) > USUAL


@pytest.mark.parametrize(
    ("way", "write"),
    [
        pytest.param(*death, id=name, marks=() if name in USUAL else pytest.mark.crash_points)
        for name, death in DEATHS.items()
    ],
)
async def test_one_copy_runs_whenever_an_agent_dies(move: Move, write: str) -> None:
    agent = move.source if write.startswith("source") else move.destination
    agent.dies_at(write, fails_then=move.way is Way.BROKEN_OFF)
    await ends_well(move)
    assert not agent.is_to_die
