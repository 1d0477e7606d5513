"""What a domain's XML says."""

from dataclasses import replace
from pathlib import Path

import libvirt
import pytest

from handoff.agent.v1 import types_pb2 as types
from handoff_agent.builds import Build
from handoff_agent.guests import GuestFacts, Layer, below_any, describe, domain_state, layers, parse_domain
from handoff_common.errors import InvalidArgumentError

RICH = (Path(__file__).parent / "data" / "rich.xml").read_text()
RUNNING = GuestFacts("a", types.DOMAIN_STATE_RUNNING, persistent=True, autostart=True)
EMULATOR = "/usr/bin/qemu-system-x86_64"
BUILD = Build(EMULATOR, "stable", "7.2.22", frozenset())


def read(xml: str, facts: GuestFacts = RUNNING) -> types.Domain:
    return describe(xml, facts, is_shared=below_any(("/srv/shared",)), builds=(BUILD,))


def test_rich_guest() -> None:
    domain = read(RICH)
    assert (domain.name, domain.uuid) == ("billing-db-1", "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0")
    assert (domain.slot, domain.state) == ("a", types.DOMAIN_STATE_RUNNING)
    assert (domain.persistent, domain.autostart) == (True, True)
    assert domain.memory_bytes == 9 << 30
    assert domain.vcpus == 8
    assert domain.cpu_model == "Cascadelake-Server-noTSX"
    assert (domain.machine_type, domain.emulator, domain.qemu_release) == ("pc-q35-7.2", EMULATOR, "7.2.22")
    assert [(disk.target, disk.format, disk.source, disk.device, disk.read_only) for disk in domain.disks] == [
        ("vda", "raw", "rbd:vms/billing-db-1-root", "disk", False),
        ("sda", "qcow2", "/srv/shared/billing-db-1-data.qcow2", "disk", False),
        ("sdb", "raw", "", "cdrom", True),
    ]
    assert [disk.placement for disk in domain.disks] == [
        types.DISK_PLACEMENT_NETWORK,
        types.DISK_PLACEMENT_SHARED,
        types.DISK_PLACEMENT_EMPTY,
    ]
    assert [(each.mac, each.source, each.tap) for each in domain.interfaces] == [
        ("52:54:00:aa:bb:01", "br-int", "tap9a2e7c1c-4f"),
        ("52:54:00:aa:bb:02", "backup", ""),
    ]


def test_a_guest_that_is_off_has_no_taps() -> None:
    off = read(RICH, GuestFacts("b", types.DOMAIN_STATE_SHUT_OFF, persistent=True, autostart=False))
    assert [each.tap for each in off.interfaces] == ["", ""]


def test_its_own_word_on_its_release_wins() -> None:
    asked = GuestFacts("a", types.DOMAIN_STATE_RUNNING, persistent=True, autostart=False, qemu_release="7.2.15")
    assert read(RICH, asked).qemu_release == "7.2.15"


def test_bare_guest() -> None:
    domain = read("<domain><name>g</name><uuid>ABC</uuid><cpu mode='host-passthrough'/></domain>")
    assert (domain.name, domain.uuid, domain.memory_bytes, domain.vcpus) == ("g", "abc", 0, 1)
    assert (domain.cpu_model, domain.machine_type, domain.emulator) == ("host-passthrough", "", "")


@pytest.mark.parametrize(
    ("disk", "source", "placement"),
    [
        ("<disk type='file'><source file='/srv/vms/a'/></disk>", "/srv/vms/a", types.DISK_PLACEMENT_LOCAL),
        ("<disk type='file'><source file='/srv/shared2/a'/></disk>", "/srv/shared2/a", types.DISK_PLACEMENT_LOCAL),
        (
            "<disk type='file'><source file='/srv/shared/../vms/a'/></disk>",
            "/srv/shared/../vms/a",
            types.DISK_PLACEMENT_LOCAL,
        ),
        ("<disk type='block'><source dev='/dev/sdb'/></disk>", "/dev/sdb", types.DISK_PLACEMENT_LOCAL),
        ("<disk type='dir'><source dir='/srv/shared/d'/></disk>", "/srv/shared/d", types.DISK_PLACEMENT_SHARED),
        ("<disk type='volume'><source pool='p' volume='v'/></disk>", "p:v", types.DISK_PLACEMENT_LOCAL),
        ("<disk type='nvme'><source type='pci' namespace='1'/></disk>", "nvme:", types.DISK_PLACEMENT_LOCAL),
        ("<disk type='network'><source protocol='nbd' name='x'/></disk>", "nbd:x", types.DISK_PLACEMENT_NETWORK),
        ("<disk type='block' device='cdrom'/>", "", types.DISK_PLACEMENT_EMPTY),
        ("<disk type='file' device='cdrom'><source startupPolicy='optional'/></disk>", "", types.DISK_PLACEMENT_EMPTY),
    ],
)
def test_placement(disk: str, source: str, placement: types.DiskPlacement.ValueType) -> None:
    (found,) = read(f"<domain><devices>{disk}</devices></domain>").disks
    assert (found.source, found.placement) == (source, placement)


def test_servers_of_a_volume() -> None:
    (disk,) = read(
        "<domain><devices><disk type='network'><source protocol='rbd' name='p/a'><host name='m1' port='6789'/>"
        "<host name='m2'/></source></disk></devices></domain>"
    ).disks
    assert list(disk.servers) == ["m1:6789", "m2:"]


def test_layers_follow_the_chain_to_its_end() -> None:
    disk = parse_domain(
        "<domain><devices><disk type='file'><driver type='qcow2'/><source file='/t'/>"
        "<backingStore type='network'><format type='raw'/><source protocol='rbd' name='p/b'/>"
        "<backingStore type='file'><format type='qcow2'/><source file='/b'/><backingStore/></backingStore>"
        "</backingStore></disk></devices></domain>"
    ).find("devices/disk")
    assert disk is not None
    assert layers(disk) == (
        Layer("file", "/t", "qcow2"),
        Layer("network", "rbd:p/b", "raw"),
        Layer("file", "/b", "qcow2"),
    )


def test_states() -> None:
    assert domain_state(libvirt.VIR_DOMAIN_BLOCKED) == types.DOMAIN_STATE_RUNNING
    assert domain_state(libvirt.VIR_DOMAIN_PMSUSPENDED) == types.DOMAIN_STATE_OTHER
    known = [value for name, value in vars(libvirt).items() if name in _state_names()]
    assert len(known) == 8
    assert all(domain_state(value) in types.DomainState.values() for value in known)


def _state_names() -> set[str]:
    states = ("NOSTATE", "RUNNING", "BLOCKED", "PAUSED", "SHUTDOWN", "SHUTOFF", "CRASHED", "PMSUSPENDED")
    return {f"VIR_DOMAIN_{state}" for state in states}


def test_memory_in_another_unit_is_not_misread() -> None:
    with pytest.raises(InvalidArgumentError, match="MiB"):
        read("<domain><memory unit='MiB'>4</memory></domain>")


def test_the_release_that_runs_counts_not_the_file() -> None:
    """A package was upgraded under a running guest: the name of the new build is not its own."""
    asked = read(RICH, replace(RUNNING, qemu_release="7.2.22"))
    assert (asked.qemu_release, asked.emulator_name) == ("7.2.22", "stable")
    replaced = read(RICH, replace(RUNNING, qemu_release="7.2.1"))
    assert (replaced.qemu_release, replaced.emulator_name) == ("7.2.1", "")
    elsewhere = read(RICH.replace(EMULATOR, "/opt/other"))
    assert (elsewhere.qemu_release, elsewhere.emulator_name) == ("", "")
