"""An agent dies before or after each write of its ledger; one copy runs in the end, and never two at once.

Where a local disk goes along it dies at each work on it too, and in the end the one copy has all that was on it.

Real agents, libvirtds and QEMUs, killed by SIGKILL, and the controllers' own driver, which retries, aborts or commits
by what it is told. `make unit` runs what is about the switch, `make crash-points` all (docs/soak.md).
"""

import asyncio
import contextlib
import os
import signal
import subprocess
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
from handoff.agent.v1.disk_pb2 import DiskMove
from handoff.controller.v1.migrations_pb2 import Migration, MigrationKind, MigrationOptions, Placement
from handoff_agent.monitor import Json, Monitor
from handoff_agent.slots import Hypervisor, Slot
from handoff_controller.agents import GrpcAgent
from handoff_controller.machine import State, enter, state_of
from handoff_controller.planner import with_defaults

MEMORY_MIB = 128
# What is on a disk, before the move and right before the switch: which byte, and where it fills 1 MiB.
EARLY, LATE = (7, 1), (9, 5)


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

    DISK = "disk"
    """With a local disk, which is copied and converted."""
    DISK_CANCELLED = "disk-cancelled"
    DISK_TAKEN_BACK = "disk-taken-back"
    PULL = "pull"
    """With a local disk, which is pulled."""
    PULL_CANCELLED = "pull-cancelled"

    @property
    def is_local(self) -> bool:
        return self in (Way.COPIED, Way.PASSED_ON)

    @property
    def pulls(self) -> bool:
        return self in (Way.PULL, Way.PULL_CANCELLED)

    @property
    def has_disk(self) -> bool:
        return self.pulls or self in (Way.DISK, Way.DISK_CANCELLED, Way.DISK_TAKEN_BACK)

    @property
    def is_cancelled(self) -> bool:
        return self in (Way.CANCELLED, Way.DISK_CANCELLED, Way.PULL_CANCELLED)

    @property
    def is_taken_back(self) -> bool:
        return self in (Way.TAKEN_BACK, Way.DISK_TAKEN_BACK)


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
_FROM_ACTIVE = ("destination ACTIVE.1", "destination FINALIZED.1", "source HELD.3", "source RELEASED.1")
_MOVED = (*_TO_HELD, "destination PREPARED.3", *_FROM_ACTIVE)
_DISK_TO_HELD = (*_TO_HELD, "destination PREPARED.3")
_DISK_MOVED = (*_DISK_TO_HELD, "destination PREPARED.4", *_FROM_ACTIVE)
_OVERLAY = ("source PREPARED.2", "source PREPARED.3")
_CANCELLED = ("destination ABORTED.1", "source ABORTED.1")
_TAKEN_BACK = ("destination FAILED.1", *_CANCELLED)
WRITES: Mapping[Way, Sequence[str]] = {
    Way.MOVED: _MOVED,
    Way.BROKEN_OFF: _MOVED,
    Way.CANCELLED: (*_TO_HELD, *_CANCELLED),
    Way.TAKEN_BACK: (*_TO_HELD, *_TAKEN_BACK),
    Way.COPIED: _MOVED,
    Way.PASSED_ON: _MOVED,
    Way.DISK: _DISK_MOVED,
    Way.DISK_CANCELLED: (*_DISK_TO_HELD, *_CANCELLED),
    Way.DISK_TAKEN_BACK: (*_DISK_TO_HELD, *_TAKEN_BACK),
    Way.PULL: (*_OVERLAY, *_DISK_MOVED, "destination ACTIVE.2"),
    Way.PULL_CANCELLED: (*_OVERLAY, *_DISK_TO_HELD, *_CANCELLED),
}
# What is done with disks between the writes. Exports are ended before they are begun, too.
WORKS: Mapping[Way, Sequence[str]] = {
    Way.DISK: (
        "destination image-made.1",
        "destination image-filled.1",
        "destination image-named.1",
        "destination exports-begun.1",
        "destination exports-ended.2",
        "destination image-removed.1",
        "source image-removed.1",
    ),
    Way.DISK_CANCELLED: ("destination exports-ended.2", "destination image-discarded.1"),
    Way.DISK_TAKEN_BACK: ("destination exports-ended.2", "destination image-discarded.1"),
    Way.PULL: (
        "source exports-begun.1",
        "destination image-named.1",
        "destination exports-begun.1",
        "destination exports-ended.2",
        "destination image-removed.1",
        "source exports-ended.2",
        "source image-removed.1",
        "source image-removed.2",
    ),
    Way.PULL_CANCELLED: ("source exports-ended.2", "source image-removed.1", "destination image-discarded.1"),
}

# About the switch, where two copies could come to run, and about what has no record of its own.
USUAL = {
    "moved-source-PREPARED.1-after",
    "moved-source-SWITCHING.1-before",
    "broken-off-source-HELD.1-before",
    "moved-source-HELD.1-after",
    "moved-destination-PREPARED.3-before",
    "moved-destination-PREPARED.3-after",
    "moved-destination-ACTIVE.1-before",
    "taken-back-source-ABORTED.1-before",
    "disk-destination-image-filled.1-before",
    "disk-destination-image-named.1-after",
    "disk-cancelled-destination-image-discarded.1-after",
}
DEATHS = {
    f"{way.value}-{write.replace(' ', '-')}-{moment}": (way, f"{write} {moment}")
    for way, writes in WRITES.items()
    for write in (*writes, *WORKS.get(way, ()))
    for moment in ("before", "after")
}


class Fleet:
    """Agents of two hosts with one slot each, and one of both slots, on the same two libvirtds."""

    def __init__(self, uris: tuple[str, str], builds: Builds, directory: Path) -> None:
        self.slots = {name: Slot(name, uri) for name, uri in zip("ab", uris, strict=True)}
        self.hypervisor = Hypervisor(list(self.slots.values()))
        first, second = uris
        h1 = MortalAgent("h1", {"a": first}, builds, directory / "h1", port(48))
        h2 = MortalAgent("h2", {"a": second}, builds, directory / "h2", port(64), disks="raw")
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

    def make_disk(self) -> None:
        image = self._image()
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "64M"], check=True)
        byte, at_mib = EARLY
        write = ["qemu-io", "-c", f"write -P {byte} {at_mib}M 1M", image]
        subprocess.run(write, check=True, stdout=subprocess.DEVNULL)

    def _image(self) -> Path:
        return self.source.images / "a.qcow2"

    def _disk(self) -> str:
        return (
            f"""<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none'/>
            <source file='{self._image()}'/><target dev='vda' bus='virtio'/></disk>"""
            if self.way.has_disk
            else ""
        )

    def define(self, connection: libvirt.virConnect) -> None:
        passable = self.way is Way.PASSED_ON
        backing = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>" if passable else ""
        extra = "<qemu:arg value='-machine'/><qemu:arg value='aux-ram-share=on'/>" if passable else ""
        domain = connection.defineXML(
            f"""<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
            <name>g-{self.guest[:6]}</name><uuid>{self.guest}</uuid><memory unit='MiB'>{MEMORY_MIB}</memory>{backing}
            <vcpu>1</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features><devices>
            <emulator>{QEMU}</emulator>{self._disk()}</devices><qemu:commandline>{extra}</qemu:commandline></domain>"""
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
        if self.way.has_disk:
            migration.options.fast = self.way.pulls
            migration.disks.extend(await self._plan())
        async with asyncio.timeout(90):
            return await Leader(
                migration, self.source, self.destination, self._entered, cancels=self.way.is_cancelled
            ).run()

    async def _plan(self) -> Sequence[DiskMove]:
        """What is done with its disk, by the word of the destination's agent."""
        async with contextlib.AsyncExitStack() as stack:
            agents = [GrpcAgent("it", side.address) for side in (self.source, self.destination)]
            for agent in agents:
                stack.push_async_callback(agent.close)
            left, arrived = agents
            guest = await left.prepare_source(FENCE, self.id, self.guest, validate_only=True)
            planned = await arrived.prepare_destination(
                FENCE, self.id, guest, "a", validate_only=True, fast=self.way.pulls
            )
            return planned.disks

    async def _entered(self, state: State) -> None:
        if state is State.SWITCHING and self.way.has_disk:
            await self._write(*LATE)
        if state is not State.COMMITTED:
            return
        self.autostart_at_commit = await self.fleet.slots["a"].on_domain(self.guest, lambda domain: domain.autostart())
        if self.way.is_taken_back:
            os.kill(incoming_qemu(self.guest), signal.SIGKILL)
            await self.destination.notes(self.id, "destination FAILED.1")

    async def _write(self, byte: int, at_mib: int) -> None:
        """Writes 1 MiB as the guest's own disk device would."""
        line = f'qemu-io -d /machine/peripheral/virtio-disk0/virtio-backend "write -P {byte} {at_mib}M 1M"'
        order: Mapping[str, Json] = {"command-line": line}
        assert not await Monitor(self.fleet.slots["a"], self.guest).execute("human-monitor-command", order)

    async def has_its_disk(self, home: str, *, late: bool) -> None:
        """All that was written is in the only image of it that is left; the guest is ended for it. `late`: LATE too."""
        jobs = await Monitor(self.fleet.slots[home], self.guest).execute("query-jobs")
        assert jobs == []
        await self.fleet.slots[home].on_domain(self.guest, lambda domain: domain.destroy())
        here, there = (self.source, self.destination) if home == "a" else (self.destination, self.source)
        assert there.disks() == []
        (image,) = here.disks()
        reads = [f"read -P {byte} {at_mib}M 1M" for byte, at_mib in (EARLY, LATE) if late or (byte, at_mib) == EARLY]
        for read in reads:
            told = await asyncio.to_thread(subprocess.check_output, ["qemu-io", "-r", "-c", read, image], text=True)
            assert "verification failed" not in told, read

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
    if way.has_disk:
        made.make_disk()
    await fleet.slots["a"].call(made.define)
    yield made
    await remove_all(fleet.hypervisor)
    for agent in (made.source, made.destination):
        agent.forget()
        for image in agent.disks():
            image.unlink()


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
    if move.way.has_disk:
        await move.has_its_disk(home, late=any(change.state == State.SWITCHING.value for change in ended.timeline))
    return ended


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, id=way.value, marks=pytest.mark.crash_points if way in WORKS and way is not Way.DISK else ())
        for way in Way
    ],
)
async def test_every_write_is_known(move: Move, way: Way) -> None:
    ended = await ends_well(move)
    assert state_of(ended) is (State.ABORTED if way.is_cancelled or way.is_taken_back else State.DONE)
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
