"""Local disks go with a running guest that writes to them: not a byte lost, and nothing left of a move or an abort."""

import asyncio
import signal
import subprocess
from contextlib import aclosing

import grpc
import grpc.aio
import pytest
from moves import CALL_S, Moves, Subject, story

from handoff.agent.v1.disk_pb2 import DiskPhase, DiskStrategy
from handoff.controller.v1.migrations_pb2 import CreateMigrationRequest, Migration, MigrationOptions
from handoff_controller.machine import State, state_of
from handoff_lab.fleet import Fleet
from handoff_lab.guest import Guests, virsh
from handoff_lab.host import LOCAL_FOLDERS, program
from handoff_lab.pattern import MIB
from handoff_lab.proof import DiskProof, Verdict

pytestmark = pytest.mark.lab

DISKS = (
    "size=1G,format=qcow2,place=local,data=40M,zeros=24M",
    "size=512M,format=raw,place=local,data=16M,zeros=16M",
)
BACKED = "size=256M,format=qcow2,place=local,data=64M,backing=raw"
VOLUME = "size=256M,volume=web,data=16M,zeros=4M"
SKIP, COPY, CONVERT, PULL = (
    DiskStrategy.DISK_STRATEGY_SKIP,
    DiskStrategy.DISK_STRATEGY_COPY,
    DiskStrategy.DISK_STRATEGY_CONVERT,
    DiskStrategy.DISK_STRATEGY_PULL,
)


class Disks:
    """A guest with local disks, and what a test asks of them."""

    def __init__(self, subject: Subject, guests: Guests, proof: DiskProof) -> None:
        self.subject = subject
        self.moves = subject.moves
        self.guests = guests
        self.proof = proof

    @classmethod
    async def create(
        cls, moves: Moves, guests: Guests, disks: tuple[str, ...] = DISKS, rate_mib_per_s: float = 2
    ) -> "Disks":
        """Boots the guest on h1; it writes its journal from then on."""
        subject = await Subject.create(moves, "stateful", "h1", disks=disks)
        proof = await DiskProof(guests, subject.name, subject.inside).begin(rate_mib_per_s)
        return cls(subject, guests, proof)

    async def move(self, options: MigrationOptions | None = None) -> Migration:
        migration = await self.moves.create(self.subject.name, await self.subject.away(), options)
        migration = await self.moves.ends(migration.id)
        assert state_of(migration) is State.DONE, story(migration)
        assert list(migration.warnings) == []
        return migration

    def images(self, host: str) -> list[str]:
        own = self.subject.fleet.host(host).directory
        found = (path for folder in LOCAL_FOLDERS for path in (own / folder).rglob("*"))
        return sorted(str(path.relative_to(own)) for path in found if path.is_file())

    def left_behind(self, host: str) -> list[str]:
        """Storage daemons."""
        return [str(path) for path in (self.subject.fleet.host(host).directory / "run/handoff/storage").glob("*")]

    async def must_be_whole_at(self, host: str, other: str, other_has: int = 0) -> Verdict:
        await self.subject.must_be_at(host)
        assert len(self.images(other)) == other_has, self.images(other)
        assert self.left_behind(host) == self.left_behind(other) == []
        verdict = await self.proof.check()
        assert verdict.intact, verdict.faults
        return verdict

    async def virsh(self, host: str, *arguments: str) -> str:
        return await asyncio.to_thread(virsh, self.guests.fleet.host(host), "a", *arguments)


async def test_there_and_back_while_the_guest_writes(moves: Moves, guests: Guests) -> None:
    disks = await Disks.create(moves, guests)
    for here, there in (("h1", "h2"), ("h2", "h1")):
        migration = await disks.move()
        assert [move.strategy for move in migration.disks] == [COPY, COPY]
        verdict = await disks.must_be_whole_at(there, here)
        # Neither holes nor written zeros have come along.
        assert verdict.disk("vda").allocated_bytes < 60 * MIB
        assert verdict.disk("vdb").allocated_bytes < 28 * MIB


async def test_an_abort_while_disks_are_copied_leaves_nothing(moves: Moves, guests: Guests) -> None:
    disks = await Disks.create(moves, guests)
    migration = await moves.create(disks.subject.name, "h2", MigrationOptions(bandwidth_bytes_per_s=4 << 20))
    async with aclosing(moves.watch(migration.id)) as updates:
        async for update in updates:
            if any(disk.done_bytes for disk in update.progress.disks):
                break
    await moves.cancel(migration.id)
    migration = await moves.ends(migration.id)
    assert state_of(migration) is State.ABORTED, story(migration)
    assert list(migration.warnings) == []
    await disks.must_be_whole_at("h1", "h2")
    assert not await disks.virsh("h1", "blockjob", disks.subject.name, "vda")


async def test_a_host_of_another_type_gets_another_format(moves: Moves, guests: Guests, fleet: Fleet) -> None:
    """qcow2 becomes raw elsewhere, flat; the definition there is right for the next cold boot, and the way back."""
    disks = await Disks.create(moves, guests, (DISKS[0], BACKED))
    await asyncio.to_thread(fleet.set_type, "h2", "ark")
    try:
        await _reaches(moves, "stateful", "h2")
        told = await asyncio.to_thread(_handoff, fleet, "migrate", "stateful", "--to", "h2", "--dry-run")
        assert "convert" in told
        assert "/srv/ark/stateful-vda.raw" in told
        assert await disks.subject.host() == "h1"
        migration = await disks.move()
        assert [move.strategy for move in migration.disks] == [CONVERT, CONVERT]
        verdict = await disks.must_be_whole_at("h2", "h1", other_has=1)  # what vdb was backed by may be others' too
        assert {(one.disk.path, one.disk.format, one.disk.layers) for one in verdict.disks} == {
            ("/srv/ark/stateful-vda.raw", "raw", 1),
            ("/srv/ark/stateful-vdb.raw", "raw", 1),
        }
        assert verdict.disk("vda").allocated_bytes < 60 * MIB
        await disks.virsh("h2", "destroy", "stateful")
        await disks.virsh("h2", "start", "stateful")
        await asyncio.to_thread(guests.wait_ready, disks.subject.record)
    finally:
        await asyncio.to_thread(fleet.set_type, "h2", "standard")


async def test_a_guest_that_writes_faster_than_is_sent_is_slowed(moves: Moves, guests: Guests) -> None:
    disks = await Disks.create(moves, guests, ("size=256M,format=qcow2,place=local,data=24M",), rate_mib_per_s=16)
    migration = await moves.create(disks.subject.name, "h2", MigrationOptions(bandwidth_bytes_per_s=8 << 20))
    decisions: set[str] = set()
    async with aclosing(moves.watch(migration.id)) as updates:
        async for update in updates:
            decisions |= {disk.decision for disk in update.progress.disks if disk.write_blocking}
            migration = update
    assert state_of(migration) is State.DONE, story(migration)
    assert any("writes as fast as is sent" in decision for decision in decisions), decisions
    await disks.must_be_whole_at("h2", "h1")


async def test_a_pull_outlives_its_link_its_leader_and_its_agent(moves: Moves, guests: Guests, fleet: Fleet) -> None:
    """The guest is there long before its disk; while the source is away its reads wait, and none fails."""
    disks = await Disks.create(moves, guests, ("size=512M,format=qcow2,place=local,data=200M", VOLUME))
    options = MigrationOptions(bandwidth_bytes_per_s=24 << 20, fast=True)
    migration = await moves.create(disks.subject.name, "h2", options)
    assert [move.strategy for move in migration.disks] == [PULL, SKIP]
    await moves.reaches(migration.id, State.FINISHING)
    async with aclosing(moves.watch(migration.id)) as updates:
        async for update in updates:
            if any(disk.phase == DiskPhase.DISK_PHASE_PULLING and disk.done_bytes for disk in update.progress.disks):
                break
    leader = await moves.wait_leader()
    other = next(name for name in moves.controllers if name != leader.name)
    fleet.set_link("h1", up=False, management=False)
    try:
        fleet.daemon(leader.name, "controller").signal(signal.SIGKILL)
        await asyncio.to_thread(fleet.host("h2").restart, "agent")
        await moves.wait_leader(other_than=leader.name)
        assert state_of(await moves.get(migration.id, other)) is State.FINISHING
    finally:
        fleet.set_link("h1", up=True, management=False)
        await asyncio.to_thread(fleet.up)
    migration = await moves.ends(migration.id, other)
    assert state_of(migration) is State.DONE, story(migration)
    verdict = await disks.must_be_whole_at("h2", "h1")
    assert verdict.disk("vda").layers == 1
    assert await asyncio.to_thread(fleet.storage.access) == {"web": ("h2",)}


async def test_a_guest_goes_on_from_the_switch_when_its_destination_dies_in_the_pull(
    moves: Moves, guests: Guests, fleet: Fleet
) -> None:
    disks = await Disks.create(moves, guests, ("size=1G,format=qcow2,place=local,data=300M",))
    options = MigrationOptions(bandwidth_bytes_per_s=24 << 20, fast=True)
    migration = await moves.create(disks.subject.name, "h2", options)
    await moves.reaches(migration.id, State.FINISHING)
    await asyncio.sleep(1)  # it writes there
    fleet.power_off("h2")
    try:
        waiting = await moves.asks(migration.id)
        assert state_of(waiting) is State.FINISHING
        command = f"recover {migration.id} --to source --i-have-fenced h2 --accept-loss"
        assert f"handoff {command}" in waiting.needs_decision
        await asyncio.to_thread(_handoff, fleet, *command.split())
        migration = await moves.ends(migration.id)
        assert state_of(migration) is State.ABORTED, story(migration)
    finally:
        await asyncio.to_thread(fleet.up)
    verdict = await disks.must_be_whole_at("h1", "h2")
    assert verdict.disk("vda").layers == 1


async def _reaches(moves: Moves, guest: str, host: str) -> None:
    """Waits until the controller has found an agent again that was restarted."""
    request = CreateMigrationRequest(guest=guest, destination_host=host, validate_only=True)
    async with asyncio.timeout(30):
        while True:
            try:
                await moves.api().CreateMigration(request, timeout=CALL_S)
                return
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
            await asyncio.sleep(0.2)


def _handoff(fleet: Fleet, *arguments: str) -> str:
    command = [str(program("handoff")), *arguments]
    done = subprocess.run(command, env=fleet.environment(), text=True, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done
    return done.stdout
