"""What the tests of moves share: the controllers' API, who leads, and whether anything is left of a move."""

import asyncio
import base64
import json
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import grpc.aio

from handoff.agent.v1.qemu_pb2 import HandoffRole, HandoffState, ListHandoffsRequest
from handoff.agent.v1.qemu_pb2_grpc import QemuServiceStub
from handoff.controller.v1.guests_pb2 import GetGuestRequest, Guest
from handoff.controller.v1.guests_pb2_grpc import GuestsServiceStub
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
from handoff_controller.settle import SETTLED
from handoff_lab.errors import LabError
from handoff_lab.fabric import OVERLAY_NET
from handoff_lab.fleet import Fleet
from handoff_lab.guest import DEFAULT_DISK, DEFAULT_NETWORK, Guests, Sighting
from handoff_lab.host import Host
from handoff_lab.probe import GuestControl, GuestStatus
from handoff_lab.state import GuestRecord
from soak.clients import AgentSide

FAST = MigrationOptions(bandwidth_bytes_per_s=64 << 20)
LEADER_HEARS_S = 0.2

OBSERVER = "h3"
CALL_S = 20.0
MOVE_S = 120.0


@dataclass(frozen=True, slots=True)
class Leader:
    """Who leads: the controller's name and its term."""

    name: str
    term: int


class Moves:
    """The fleet's controllers, as a client sees them."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.controllers = [node.name for node in fleet.status() if node.name.startswith("ctl")]
        self._channels = {name: open_channel(f"unix:{fleet.lab.controller_socket(name)}") for name in self.controllers}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for channel in self._channels.values():
            await channel.close()

    def api(self, controller: str | None = None) -> MigrationsServiceStub:
        """The migrations of one controller; by default of the first."""
        return MigrationsServiceStub(self._channels[controller or self.controllers[0]])

    async def leader(self) -> Leader | None:
        """The leader by etcd's word."""
        answer = await asyncio.to_thread(
            self.fleet.node("etcd1").run, ["etcdctl", "get", "--prefix", "/handoff/v1/leader/", "-w", "json"]
        )
        candidates = json.loads(answer.stdout).get("kvs", [])
        if not candidates:
            return None
        first = min(candidates, key=lambda candidate: candidate["create_revision"])
        return Leader(json.loads(base64.b64decode(first["value"]))["name"], first["create_revision"])

    async def wait_leader(self, other_than: str | None = None, deadline_s: float = 30) -> Leader:
        """Waits for a leader, or for another one."""
        async with asyncio.timeout(deadline_s):
            while True:
                leader = await self.leader()
                if leader is not None and leader.name != other_than:
                    return leader
                await asyncio.sleep(0.1)

    async def create(
        self, guest: str, host: str, options: MigrationOptions | None = None, controller: str | None = None
    ) -> Migration:
        """Creates a migration; raises AioRpcError when it is refused."""
        request = CreateMigrationRequest(guest=guest, destination_host=host, options=options or MigrationOptions())
        return (await self.api(controller).CreateMigration(request, timeout=CALL_S)).migration

    async def cancel(self, migration_id: str) -> Migration:
        """Asks for the abort."""
        return (await self.api().CancelMigration(CancelMigrationRequest(id=migration_id), timeout=CALL_S)).migration

    async def get(self, migration_id: str, controller: str | None = None) -> Migration:
        """The record."""
        request = GetMigrationRequest(id=migration_id)
        return (await self.api(controller).GetMigration(request, timeout=CALL_S)).migration

    async def watch(self, migration_id: str, controller: str | None = None) -> AsyncIterator[Migration]:
        """The record as it changes."""
        call = self.api(controller).WatchMigration(WatchMigrationRequest(id=migration_id), timeout=MOVE_S)
        try:
            async for update in call:
                yield update.migration
        finally:
            call.cancel()

    async def reaches(self, migration_id: str, state: State, controller: str | None = None) -> Migration:
        """Waits until the migration is in `state`. Fails when it ends in another."""
        async with aclosing(self.watch(migration_id, controller)) as updates:
            async for migration in updates:
                if state_of(migration) is state:
                    return migration
                assert state_of(migration) not in FINAL, f"not {state.name} but {story(migration)}"
        raise AssertionError(f"the watch ended before {state.name}")

    async def copies(self, migration_id: str) -> Migration:
        """Waits until memory is on its way."""
        async with aclosing(self.watch(migration_id)) as updates:
            async for migration in updates:
                if migration.progress.ram_transferred_bytes:
                    return migration
        raise AssertionError("the watch ended before the copy began")

    async def asks(self, migration_id: str) -> Migration:
        """Waits until an operator has to decide."""
        async with aclosing(self.watch(migration_id)) as updates:
            async for migration in updates:
                if migration.needs_decision:
                    return migration
        raise AssertionError("the watch ended before a decision was needed")

    async def ends(self, migration_id: str, controller: str | None = None) -> Migration:
        """Waits for the final state."""
        async with aclosing(self.watch(migration_id, controller)) as updates:
            async for migration in updates:
                if state_of(migration) in FINAL:
                    return migration
        raise AssertionError("the watch ended before the migration")

    async def guest(self, name: str) -> Guest:
        """The controller's record of a guest."""
        stub = GuestsServiceStub(self._channels[self.controllers[0]])
        return (await stub.GetGuest(GetGuestRequest(guest=name), timeout=CALL_S)).guest

    async def known(self, name: str) -> Guest:
        """Waits until the controller has seen a new guest."""
        async with asyncio.timeout(30):
            while True:
                try:
                    return await self.guest(name)
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.NOT_FOUND:
                        raise
                await asyncio.sleep(0.1)


def story(migration: Migration) -> str:
    """A migration in a line, for messages."""
    states = " → ".join(State(change.state).name for change in migration.timeline)
    return f"{states}: {migration.error} {list(migration.warnings)}"


class Subject:
    """The guest that a test moves, and what it must still be afterwards."""

    def __init__(self, moves: Moves, record: GuestRecord, before: GuestStatus, build: str) -> None:
        self.moves = moves
        self.fleet = moves.fleet
        self.record = record
        self.name = record.name
        self.inside = GuestControl(self.fleet.node(OBSERVER), record.ip)
        self._before = before
        self._build = build

    @classmethod
    async def create(
        cls,
        moves: Moves,
        name: str,
        host: str,
        memory_mib: int = 128,
        *,
        disks: tuple[str, ...] = (DEFAULT_DISK,),
        release: str = "",
        machine: str = "",
        network: str = DEFAULT_NETWORK,
    ) -> "Subject":
        """Boots the guest and waits until the controller knows it; the options are those of Guests.create."""
        boot = partial(Guests(moves.fleet).create, disks=disks, release=release, machine=machine, network=network)
        record = await asyncio.to_thread(boot, name, host, memory_mib)
        before = await GuestControl(moves.fleet.node(OBSERVER), record.ip).status()
        return cls(moves, record, before, (await moves.known(name)).domain.emulator_name)

    async def host(self) -> str:
        """Where it runs, by libvirt's word. Fails when it runs nowhere, or twice."""
        return (await asyncio.to_thread(Guests(self.fleet).running_on, self.name)).name

    async def away(self) -> str:
        """The one of h1 and h2 where it does not run."""
        return "h2" if await self.host() == "h1" else "h1"

    async def must_be_at(self, host: str) -> None:
        """It runs there and nowhere else, was never rebooted, and nothing is left of any move."""
        assert await self.host() == host
        status = await self.inside.status()
        assert status.boot_id == self._before.boot_id, "the guest rebooted"
        assert status.monotonic_ns > self._before.monotonic_ns, "the guest's clock went back"
        assert status.dirty.bad_pages == 0
        assert status.journal.write_errors == 0
        await self._nothing_left(host)
        guest = await self.moves.guest(self.name)
        assert guest.owner.host == host
        assert guest.active_migration == ""
        assert list(guest.conflicts) == []

    async def is_as_new(self) -> bool:
        """Whether another test may have it: under its QEMU build, in slot a, idle, and nothing left of any move."""
        try:
            await self.must_be_at(await self.host())
            status = await self.inside.status()
            build = (await self.moves.guest(self.name)).domain.emulator_name
        except (AssertionError, LabError, OSError, TimeoutError, grpc.aio.AioRpcError):
            return False
        slots = {seen.slot for seen in await asyncio.to_thread(Guests(self.fleet).find, self.name)}
        is_idle = not status.dirty.working_set_mib and not status.journal.running
        return is_idle and (slots, build) == ({"a"}, self._build)

    async def _nothing_left(self, home: str, deadline_s: float = 20) -> None:
        until = asyncio.get_running_loop().time() + deadline_s
        while leftovers := await self._leftovers(home):
            assert asyncio.get_running_loop().time() < until, leftovers
            await asyncio.sleep(0.2)

    async def _leftovers(self, home: str) -> list[str]:
        found: list[str] = []
        sightings = await asyncio.to_thread(Guests(self.fleet).sightings)
        ours = [seen for seen in sightings if seen.guest == self.name]
        found += [f"{seen.host}/{seen.slot}: {seen.state}" for seen in ours if seen.host != home]
        found += [f"at home: {seen.state}" for seen in ours if seen.host == home and seen.state != "running"]
        hosts = [Host(self.fleet.lab, n) for n in range(1, self.fleet.lab.require_config().hosts + 1)]
        for left in await asyncio.gather(*(self._left_on(host, sightings) for host in hosts if host.node.pid())):
            found += left
        return found

    async def _left_on(self, host: Host, sightings: Sequence[Sighting]) -> list[str]:
        found: list[str] = []
        listing, ports, handoffs = await asyncio.gather(
            asyncio.to_thread(host.node.run, ["ss", "-Htan"]),
            asyncio.to_thread(host.node.run, ["ovs-vsctl", "list-ports", "br-int"]),
            unsettled(self.fleet, host.name),
        )
        for line in listing.stdout.splitlines():
            state, _, _, local, *_ = line.split()
            # By address: the ports of migration streams are also ordinary ephemeral ports.
            if state != "TIME-WAIT" and local.startswith(f"{OVERLAY_NET}."):
                found.append(f"{host.name}: {line}")
        taps = [port for port in ports.stdout.split() if port.startswith("vnet")]
        if len(taps) > sum(seen.host == host.name and seen.state == "running" for seen in sightings):
            found.append(f"{host.name}: switch ports {taps}")
        return found + [f"{host.name}: {handoff}" for handoff in handoffs]


async def unsettled(fleet: Fleet, host: str) -> list[str]:
    """Handoffs that an agent has not ended."""
    async with open_channel(f"unix:{fleet.lab.agent_socket(host)}") as channel:
        answer = await QemuServiceStub(channel).ListHandoffs(ListHandoffsRequest(), timeout=CALL_S)
    return [f"{one.migration_id} {HandoffState.Name(one.state)}" for one in answer.handoffs if one.state not in SETTLED]


def qemu_on(fleet: Fleet, host: str, guest: str) -> int:
    """The pid of the guest's QEMU on one host: during a move there are two."""
    where = fleet.host(host)
    inner = int((where.directory / f"run/handoff/slots/a/qemu/{guest}.pid").read_text())
    pid = where.node.find(inner)
    assert pid is not None
    return pid


@asynccontextmanager
async def order_held_up(subject: Subject, there: str, controller: str | None = None) -> AsyncIterator[Migration]:
    """A migration in SWITCHING whose destination was asked, and whose source hears of the order when this ends.

    etcd stands still until the source is ready, so that the leader can't go on; then the source's agent does.
    """
    fleet, here = subject.fleet, await subject.host()
    etcd, source = fleet.daemon("etcd1", "etcd"), fleet.daemon(here, "agent")
    migration = await subject.moves.create(subject.name, there, FAST, controller)
    await subject.moves.reaches(migration.id, State.COPYING, controller)
    etcd.signal(signal.SIGSTOP)
    try:
        ready = frozenset({HandoffState.HANDOFF_STATE_READY})
        await AgentSide(fleet.lab, here).reaches(migration.id, HandoffRole.HANDOFF_ROLE_SOURCE, ready)
        await asyncio.sleep(LEADER_HEARS_S)
        source.signal(signal.SIGSTOP)
    finally:
        etcd.signal(signal.SIGCONT)
    try:
        await subject.moves.reaches(migration.id, State.SWITCHING, controller)
        await asyncio.sleep(LEADER_HEARS_S)
        yield migration
    finally:
        source.signal(signal.SIGCONT)
