"""What is told of a guest's disks, by a real QEMU: whatever they are plugged into."""

import subprocess
import uuid
from pathlib import Path

from builds import QEMU, Builds
from one_host import remove_all
from ports import port
from test_handoffs import Host

from handoff.agent.v1 import types_pb2 as types

BUSES = {"vda": "virtio", "sda": "sata", "sdb": "scsi", "sdc": "usb"}


def make_image(path: Path, size_mib: int, *more: str) -> None:
    image_format = path.suffix.removeprefix(".")
    subprocess.run(["qemu-img", "create", "-q", "-f", image_format, *more, str(path), f"{size_mib}M"], check=True)


def add_bitmap(path: Path, name: str) -> None:
    subprocess.run(["qemu-img", "bitmap", "--add", str(path), name], check=True)


async def test_disks_on_every_bus(libvirtd: str, builds: Builds, tmp_path: Path) -> None:
    host = Host("h1", libvirtd, builds, tmp_path / "1", port(0))
    disks = "<disk type='file' device='cdrom'><target dev='sdd' bus='sata'/><readonly/></disk>"
    base, data = tmp_path / "base.qcow2", tmp_path / "data"
    make_image(base, 9)
    add_bitmap(base, "backup-1")
    options = {"sda": ("-o", f"data_file={data}"), "sdb": ("-b", str(base), "-F", "qcow2")}
    for number, (target, bus) in enumerate(BUSES.items()):
        path = tmp_path / f"{target}.qcow2"
        make_image(path, 10 + number, *options.get(target, ()))
        if target.startswith("sd"):
            add_bitmap(path, "backup-2")
        disks += (
            f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{path}'/>"
            f"<target dev='{target}' bus='{bus}'/></disk>"
        )
    identity = str(uuid.uuid4())
    xml = f"""<domain type='qemu'><name>g-{identity[:6]}</name><uuid>{identity}</uuid><memory unit='MiB'>64</memory>
    <os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features><devices>
    <emulator>{QEMU}</emulator>{disks}<controller type='scsi' model='virtio-scsi'/></devices></domain>"""
    async with host.running():
        await host.slot.call(lambda connection: connection.createXML(xml, 0) and None)
        _, guest = await host.handoffs.prepare_source("m", identity, validate_only=True)
        await remove_all(host.hypervisor)
    found = {facts.target: facts for facts in guest.disks}
    assert {target: found[target].virtual_size_bytes >> 20 for target in BUSES} == {
        "vda": 10,
        "sda": 11,
        "sdb": 12,
        "sdc": 13,
    }
    assert list(found["sdb"].backing) == [str(base)]
    assert {target: found[target].data_file for target in BUSES} == {"vda": "", "sda": str(data), "sdb": "", "sdc": ""}
    assert {target: list(found[target].bitmaps) for target in BUSES} == {
        "vda": [],
        "sda": ["backup-2"],
        "sdb": ["backup-1", "backup-2"],
        "sdc": ["backup-2"],
    }
    assert all(found[target].cluster_bytes == 65536 for target in BUSES)
    assert all(found[target].placement == types.DISK_PLACEMENT_LOCAL for target in BUSES)
    assert found["sdd"].placement == types.DISK_PLACEMENT_EMPTY
