"""Local disks go with a running guest that writes to them: not a byte lost, and nothing left of a move or an abort."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from moves import OBSERVER, Moves, Subject, story

from handoff.agent.v1.disk_pb2 import DiskStrategy
from handoff.controller.v1.migrations_pb2 import Migration, MigrationOptions
from handoff_controller.machine import State, state_of
from handoff_lab.fleet import Fleet
from handoff_lab.guest import Guests, virsh
from handoff_lab.pattern import MIB
from handoff_lab.probe import UdpProbe
from handoff_lab.proof import DiskProof

pytestmark = pytest.mark.lab

DISKS = (
    "size=1G,format=qcow2,place=local,data=40M,zeros=24M",
    "size=512M,format=raw,place=local,data=16M,zeros=16M",
)


class Disks:
    """A guest with local disks, and what a test asks of them."""

    def __init__(self, subject: Subject, guests: Guests, proof: DiskProof) -> None:
        self.subject = subject
        self.moves = subject.moves
        self.guests = guests
        self.proof = proof

    async def move(self, options: MigrationOptions | None = None) -> Migration:
        migration = await self.moves.create(self.subject.name, await self.subject.away(), options)
        return await self.moves.ends(migration.id)

    def images(self, host: str) -> list[str]:
        return sorted(path.name for path in (self.subject.fleet.host(host).directory / "vms").glob("*"))

    def daemons(self, host: str) -> list[str]:
        return [str(path) for path in (self.subject.fleet.host(host).directory / "run/handoff/storage").glob("*")]

    async def must_be_whole_at(self, host: str, other: str) -> None:
        await self.subject.must_be_at(host)
        assert len(self.images(host)) == len(DISKS)
        assert self.images(other) == []
        assert self.daemons(host) == self.daemons(other) == []
        verdict = await self.proof.check()
        assert verdict.intact, verdict.faults


@pytest.fixture
async def disks(moves: Moves, guests: Guests) -> AsyncIterator[Disks]:
    subject = await Subject.create(moves, "stateful", "h1", disks=DISKS)
    proof = await DiskProof(guests, subject.name, subject.inside).begin(rate_mib_per_s=2)
    yield Disks(subject, guests, proof)


async def test_there_and_back_while_the_guest_writes(disks: Disks, fleet: Fleet) -> None:
    for here, there in (("h1", "h2"), ("h2", "h1")):
        async with UdpProbe(fleet.lab, fleet.node(OBSERVER), disks.subject.record.ip) as probe:
            migration = await disks.move()
            udp = await probe.stop()
        assert state_of(migration) is State.DONE, story(migration)
        assert list(migration.warnings) == []
        assert udp.duplicated == 0
        assert [move.strategy for move in migration.disks] == [DiskStrategy.DISK_STRATEGY_COPY] * 2
        await disks.must_be_whole_at(there, here)
        verdict = await disks.proof.check()
        # Neither holes nor written zeros have come along.
        assert verdict.disk("vda").allocated_bytes < 60 * MIB
        assert verdict.disk("vdb").allocated_bytes < 20 * MIB


async def test_an_abort_while_disks_are_copied_leaves_nothing(disks: Disks) -> None:
    options = MigrationOptions(bandwidth_bytes_per_s=4 << 20)
    migration = await disks.moves.create(disks.subject.name, "h2", options)
    async for update in disks.moves.watch(migration.id):
        if any(disk.done_bytes for disk in update.progress.disks):
            break
    await disks.moves.cancel(migration.id)
    migration = await disks.moves.ends(migration.id)
    assert state_of(migration) is State.ABORTED, story(migration)
    assert list(migration.warnings) == []
    await disks.must_be_whole_at("h1", "h2")
    jobs = await asyncio.to_thread(virsh, disks.guests.fleet.host("h1"), "a", "blockjob", disks.subject.name, "vda")
    assert "No current block job" in jobs or not jobs.strip()
