"""What a guest that was shut down still lacks is pulled without it: qemu-img and a storage daemon, both real."""

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import structlog
from test_mirror import ADDRESS, EMULATORS, MIB, same

from handoff.agent.v1 import disk_pb2 as pb
from handoff_agent.disks import images
from handoff_agent.disks.pull import Pull
from handoff_agent.disks.qemu_img import is_flat
from handoff_agent.disks.storage_daemon import Export, StorageDaemon, find_binary
from handoff_agent.slots import Hypervisor, Slot

SIZE_MIB = 64
RATE_MIB_PER_S = 32
# What qemu-img reads at once, and what its throttle lets pass at once: a tenth of a second's worth.
AT_ONCE_MIB = 2 + RATE_MIB_PER_S / 10


def make_base(path: Path) -> None:
    """Half of it data, half a hole."""
    images.create(str(path), "raw", SIZE_MIB * MIB)
    write = f"write -P 7 1M {SIZE_MIB // 2}M"
    subprocess.run(["qemu-io", "-f", "raw", "-c", write, str(path)], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("rate_mib_per_s", [RATE_MIB_PER_S, 0], ids=["bounded", "unbounded"])
async def test_without_its_guest_a_pull_keeps_to_the_bandwidth_too(
    libvirtd: str, tmp_path: Path, rate_mib_per_s: int
) -> None:
    folder = tmp_path / "with, comma"
    folder.mkdir()
    base, image = folder / "base.raw", folder / "image.qcow2"
    make_base(base)
    readings: list[pb.DiskProgress] = []
    slot = Slot("a", libvirtd)
    with ThreadPoolExecutor(1) as threads:
        daemon = StorageDaemon(tmp_path / "run" / "m1" / "base", threads)
        export = Export("m1-vda-base", str(base), "raw", writable=False)
        uris = await daemon.start(find_binary(EMULATORS["10.0"]), [export], ADDRESS)
        move = pb.DiskMove(
            target="vda",
            strategy=pb.DISK_STRATEGY_PULL,
            path=str(image),
            format="qcow2",
            virtual_size_bytes=SIZE_MIB * MIB,
            bytes_to_send=SIZE_MIB // 2 * MIB,
            base_uri=uris["m1-vda-base"],
        )
        images.create(move.path, "qcow2", move.virtual_size_bytes, base_uri=move.base_uri)
        pull = Pull(slot, "6f0b3cf0-0000-4000-8000-000000000001", move, rate_mib_per_s * MIB, structlog.get_logger())
        async with Hypervisor([slot]).running():
            assert await slot.wait_connected(10)
            began_s = time.monotonic()
            await pull.run(readings.append)
            took_s = time.monotonic() - began_s
        await daemon.stop()
    assert await is_flat(move.path)
    assert same(base, image)
    assert image.stat().st_blocks * 512 < (SIZE_MIB // 2 + 2) * MIB
    if rate_mib_per_s:
        assert took_s >= (SIZE_MIB - AT_ONCE_MIB) / RATE_MIB_PER_S
    done = [reading.done_bytes for reading in readings if reading.phase == pb.DISK_PHASE_PULLING]
    assert done == sorted(done)
    assert len(done) > 4
    assert not any(reading.decision for reading in readings)
    assert readings[-1].phase == pb.DISK_PHASE_COMPLETE
