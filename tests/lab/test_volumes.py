"""Guests on network volumes: both hosts are let in while a guest moves, and one is shut out again, at the storage."""

import asyncio

import pytest
from moves import Moves, Subject, story

from handoff.controller.v1.migrations_pb2 import MigrationOptions
from handoff_controller.machine import State, state_of
from handoff_lab.fleet import Fleet
from handoff_lab.guest import Guests
from handoff_lab.nbd import NbdClient
from handoff_lab.netns import NetNamespace
from handoff_lab.proof import DiskProof
from handoff_lab.storage import Storage

pytestmark = pytest.mark.lab

DISK = "size=256M,volume=web,data=16M,zeros=4M"
HOLE = 200 << 20


def access(fleet: Fleet) -> tuple[str, ...]:
    return fleet.storage.access()["web"]


def open_from(fleet: Fleet, host: str, storage: Storage) -> NbdClient:
    """A client of the volume on a host: what a QEMU that has not ended there would be. Raises OSError."""
    with NetNamespace.of(fleet.node(host)) as network:
        connection = network.socket()
    connection.settimeout(5)
    connection.connect((storage.address, storage.volume("web").port))
    return NbdClient(connection, "web")


async def test_a_volume_goes_along_and_shuts_its_old_host_out(moves: Moves, guests: Guests) -> None:
    fleet, storage = moves.fleet, moves.fleet.storage
    subject = await Subject.create(moves, "mover", "h1", disks=(DISK,))
    proof = await DiskProof(guests, "mover", subject.inside).begin(rate_mib_per_s=2)
    assert await asyncio.to_thread(access, fleet) == ("h1",)
    with pytest.raises(ConnectionError):
        open_from(fleet, "h2", storage)
    stale = open_from(fleet, "h1", storage)
    stale.write(HOLE, bytes(4096))

    migration = await moves.ends((await moves.create("mover", "h2")).id)

    assert state_of(migration) is State.DONE, story(migration)
    assert list(migration.warnings) == []
    assert [(one.protocol, one.name) for one in migration.volumes] == [("nbd", "web")]
    assert await asyncio.to_thread(access, fleet) == ("h2",)
    # A connection that was there before the commit is worth no more than a new one.
    with pytest.raises(OSError, match=r".*"), stale:
        stale.write(HOLE, b"late" * 1024)
    with pytest.raises(ConnectionError):
        open_from(fleet, "h1", storage)
    await subject.must_be_at("h2")
    verdict = await proof.check()
    assert verdict.intact, verdict.faults


async def test_an_abort_shuts_the_destination_out_again(moves: Moves, guests: Guests) -> None:
    fleet = moves.fleet
    subject = await Subject.create(moves, "mover", "h1", disks=(DISK,))
    proof = await DiskProof(guests, "mover", subject.inside).begin(rate_mib_per_s=2)
    migration = await moves.create("mover", "h2", MigrationOptions(bandwidth_bytes_per_s=4 << 20))
    await moves.reaches(migration.id, State.COPYING)
    assert await asyncio.to_thread(access, fleet) == ("h1", "h2")

    await moves.cancel(migration.id)
    migration = await moves.ends(migration.id)

    assert state_of(migration) is State.ABORTED, story(migration)
    assert list(migration.warnings) == []
    assert await asyncio.to_thread(access, fleet) == ("h1",)
    with pytest.raises(ConnectionError):
        open_from(fleet, "h2", fleet.storage)
    await subject.must_be_at("h1")
    verdict = await proof.check()
    assert verdict.intact, verdict.faults
