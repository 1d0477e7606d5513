"""Made disks hold what was asked for, and the proof of a guest's disks sees what it is there to see."""

import asyncio
from pathlib import Path

import pytest

from handoff_lab.fleet import Fleet
from handoff_lab.guest import Guests
from handoff_lab.host import Host
from handoff_lab.pattern import MIB
from handoff_lab.probe import GuestControl
from handoff_lab.proof import DiskProof

pytestmark = pytest.mark.lab

DISKS = (
    "size=1G,format=qcow2,place=local,data=40M,zeros=24M",
    "size=512M,format=raw,place=local,data=16M,zeros=16M",
    "size=256M,format=qcow2,place=shared,data=16M,backing=raw",
)


async def test_the_proof_sees_one_wrong_byte(fleet: Fleet, guests: Guests) -> None:
    guest = await asyncio.to_thread(guests.create, "proven", "h1", 128, 1, DISKS)
    inside = GuestControl(fleet.node("h3"), guest.ip)
    proof = await DiskProof(guests, "proven", inside).begin(rate_mib_per_s=2)
    await asyncio.sleep(2)
    verdict = await proof.check()
    assert verdict.intact, verdict.faults
    found = {check.disk.target: check for check in verdict.disks}
    assert [(c.disk.format, c.disk.layers) for c in found.values()] == [("qcow2", 1), ("raw", 1), ("qcow2", 2)]
    assert found["vda"].journal is not None
    assert found["vda"].journal.checked > 0
    # Written zeros are allocated, holes are not.
    assert 64 * MIB <= found["vda"].disk.allocated_bytes <= 74 * MIB
    assert 32 * MIB <= found["vdb"].disk.allocated_bytes <= 33 * MIB
    assert [check.compared_bytes // MIB for check in verdict.disks] == [961, 512, 256]

    image = _outside(fleet.host("h1"), found["vdb"].disk.path)
    with image.open("r+b") as file:
        file.seek(64 * MIB + 12345)
        byte = file.read(1)[0]
        file.seek(64 * MIB + 12345)
        file.write(bytes([byte ^ 1]))
    verdict = await proof.check()
    assert not verdict.intact
    assert [(c.disk.target, c.wrong_at) for c in verdict.disks if not c.intact] == [("vdb", (64 * MIB,))]
    assert (await inside.status()).journal.running


def _outside(host: Host, path: str) -> Path:
    return host.directory / "vms" / Path(path).name
