"""Why a guest can't be handed over."""

from dataclasses import replace
from pathlib import Path

import pytest

from handoff.agent.v1 import types_pb2 as types
from handoff_agent.builds import Build, choose_build
from handoff_agent.guests import GuestFacts, below_any, describe
from handoff_agent.movable import (
    HostFacts,
    Obstacle,
    ObstacleKind,
    SourceFacts,
    destination_obstacles,
    obstacles,
    refusal,
)
from handoff_common.errors import ExhaustedError, PreconditionError

RICH = (Path(__file__).parent / "data" / "rich.xml").read_text()
RUNNING = GuestFacts("a", types.DOMAIN_STATE_RUNNING, persistent=True, autostart=True)
EMULATOR = "/usr/bin/qemu-system-x86_64"
NOTHING = SourceFacts(live_xml="")
SHARED = below_any(("/srv/shared",))
BUILD = Build(EMULATOR, "stable", "7.2.22", frozenset({"pc-q35-7.2"}), frozenset({"Cascadelake-Server-noTSX"}))


def guest_of(xml: str, facts: GuestFacts = RUNNING) -> types.Domain:
    return describe(xml, facts, is_shared=SHARED, builds=(Build(EMULATOR, "old", "7.2.22", frozenset()),))


def reasons(xml: str, guest: GuestFacts = RUNNING, facts: SourceFacts = NOTHING) -> tuple[str, ...]:
    return obstacles(guest_of(xml, guest), replace(facts, live_xml=xml), is_shared=SHARED)


def reasons_of_device(device: str) -> tuple[str, ...]:
    return reasons(f"<domain><name>g1</name><devices>{device}</devices></domain>")


HOST = HostFacts(
    name="h2",
    memory_free_bytes=16 << 30,
    names=frozenset({"other"}),
    uuids=frozenset({"another"}),
    builds=(BUILD,),
    bridges=frozenset({"br-int", "backup"}),
)


def test_rich_guest_can_go_and_come() -> None:
    assert reasons(RICH) == ()
    assert destination_obstacles(guest_of(RICH), HOST) == ()
    assert refusal(()) is None


@pytest.mark.parametrize(
    "disk",
    [
        "<disk type='network'><driver cache='none'/><source protocol='nbd' name='a'/><target dev='vda'/></disk>",
        "<disk type='network'><driver cache='writeback'/><source protocol='rbd' name='p/a'/><target dev='vda'/></disk>",
        "<disk type='network'><driver cache='directsync'/><source protocol='iscsi' name='i'/><target dev='a'/></disk>",
        "<disk type='network' device='cdrom'><source protocol='https' name='a.iso'/><target dev='sda'/></disk>",
    ],
)
def test_network_volumes_can_go(disk: str) -> None:
    assert reasons_of_device(disk) == ()


LEAVING = {
    "volume with a cache": (
        "<disk type='network'><driver name='qemu' cache='writeback'/><source protocol='nbd' name='a'>"
        "<host name='s'/></source><target dev='vda'/></disk>",
        "disk vda is a nbd volume with cache=writeback",
    ),
    "volume with libvirt's cache": (
        "<disk type='network'><source protocol='iscsi' name='a'/><target dev='vda'/></disk>",
        "disk vda is a iscsi volume with cache=default",
    ),
    "volume behind a local socket": (
        "<disk type='network'><driver name='qemu' cache='none'/><source protocol='nbd' name='a'>"
        "<host transport='unix' socket='/run/nbd'/></source><target dev='vda'/></disk>",
        "disk vda is a nbd volume behind the socket /run/nbd of this host",
    ),
    "local backing": (
        "<disk type='file'><source file='/srv/shared/top'/><backingStore type='file'><format type='raw'/>"
        "<source file='/srv/vms/base'/><backingStore/></backingStore><target dev='vda'/></disk>",
        "disk vda is backed by /srv/vms/base on this host alone",
    ),
    "transient": (
        "<disk type='file'><source file='/srv/shared/a'/><target dev='vda'/><transient/></disk>",
        "disk vda is transient",
    ),
    "reservations": (
        "<disk type='block' device='lun'><source dev='/srv/shared/lun'><reservations managed='yes'/></source>"
        "<target dev='sda'/></disk>",
        "disk sda is a LUN with SCSI reservations",
    ),
    "mirror": (
        "<disk type='file'><source file='/srv/shared/a'/><mirror type='file'/><target dev='vda'/></disk>",
        "disk vda is being mirrored",
    ),
    "pci": (
        "<hostdev mode='subsystem' type='pci'><alias name='hostdev0'/></hostdev>",
        "a pci device of this host is passed through (hostdev0); detach it",
    ),
    "mdev": ("<hostdev mode='subsystem' type='mdev'/>", "a mdev device of this host is passed through"),
    "usb": ("<hostdev mode='subsystem' type='usb'/>", "a usb device of this host is passed through"),
    "capabilities": ("<hostdev mode='capabilities' type='misc'/>", "a misc device of this host is passed through"),
    "sriov": (
        "<interface type='hostdev'><mac address='52:54:00:00:00:01'/></interface>",
        "interface 52:54:00:00:00:01 passes a device of this host through",
    ),
    "macvtap": ("<interface type='direct'><mac address='m'/></interface>", "interface m is a macvtap"),
    "vdpa": ("<interface type='vdpa'><mac address='m'/></interface>", "interface m uses a vDPA device"),
    "vhost-user": (
        "<interface type='vhostuser'><mac address='m'/></interface>",
        "interface m uses a vhost-user socket",
    ),
    "shmem": ("<shmem name='s' role='peer'/>", "shmem s is shared with other guests"),
    "filesystem": ("<filesystem type='mount'><target dir='home'/></filesystem>", "filesystem home is a folder"),
    "smart card": ("<smartcard mode='host'/>", "this host's smart card is passed through"),
    "serial device": (
        "<serial type='dev'><source path='/dev/ttyS0'/><alias name='serial0'/></serial>",
        "serial serial0 is /dev/ttyS0 of this host",
    ),
    "nvdimm": ("<memory model='nvdimm'/>", "nvdimm without alias keeps its data in a file of this host"),
    "sgx": ("<memory model='sgx-epc'/>", "it uses an SGX enclave"),
    "dimm": ("<memory model='dimm'/>", "dimm without alias has no slot and base address"),
    "tpm state": ("<tpm><backend type='emulator'/></tpm>", "the state of its TPM is on this host"),
    "tpm device": ("<tpm><backend type='passthrough'/></tpm>", "its TPM (passthrough) belongs to this host"),
}


@pytest.mark.parametrize("case", LEAVING)
def test_what_keeps_a_guest(case: str) -> None:
    device, expected = LEAVING[case]
    (reason,) = reasons_of_device(device)
    assert reason.startswith(f"guest g1: {expected}")


STAYING_IS_NOT_NEEDED = {
    "empty drive": "<disk type='file' device='cdrom'><target dev='sda'/><readonly/></disk>",
    "shared iso": "<disk type='file' device='cdrom'><source file='/srv/shared/a.iso'/></disk>",
    "lun": "<disk type='block' device='lun'><source dev='/srv/shared/lun'/></disk>",
    "shmem master": "<shmem name='s' role='master'/>",
    "virtio-mem": "<memory model='virtio-mem'/>",
    "plugged dimm": "<memory model='dimm'><address type='dimm' slot='0' base='0x1'/></memory>",
    "slirp": "<interface type='user'/>",
    "console of a serial device": "<console type='dev'><target type='serial'/></console>",
}


@pytest.mark.parametrize("case", STAYING_IS_NOT_NEEDED)
def test_what_does_not_keep_a_guest(case: str) -> None:
    assert reasons_of_device(STAYING_IS_NOT_NEEDED[case]) == ()


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (replace(NOTHING, block_jobs=("vda",)), "disk vda has a block job"),
        (replace(NOTHING, snapshots=2), "it has 2 snapshots"),
        (replace(NOTHING, checkpoints=1), "it has 1 checkpoints"),
        (replace(NOTHING, blocked_reasons=("no such luck",)), "QEMU refuses to migrate it: no such luck"),
    ],
)
def test_what_libvirt_tells_beside_the_xml(facts: SourceFacts, expected: str) -> None:
    (reason,) = reasons(RICH, facts=facts)
    assert reason.startswith(f"guest billing-db-1: {expected}")


@pytest.mark.parametrize("state", [types.DOMAIN_STATE_SHUT_OFF, types.DOMAIN_STATE_OTHER])
def test_only_loaded_guests_move(state: types.DomainState.ValueType) -> None:
    (reason,) = reasons(RICH, guest=replace(RUNNING, state=state))
    assert "neither running nor paused" in reason


def test_paused_guests_move() -> None:
    assert reasons(RICH, guest=replace(RUNNING, state=types.DOMAIN_STATE_PAUSED)) == ()


def test_every_reason_is_told() -> None:
    found = reasons_of_device("<tpm><backend type='emulator'/></tpm><hostdev type='pci'/><interface type='direct'/>")
    assert len(found) == 3


def test_encrypted_memory() -> None:
    (reason,) = reasons("<domain><launchSecurity type='sev'/></domain>")
    assert "encrypted by the CPU (sev)" in reason


@pytest.mark.parametrize(
    ("policy", "clock", "stays"),
    [
        ("require", "", True),
        ("disable", "", False),
        ("require", "<clock><timer name='tsc' frequency='2500000000'/></clock>", False),
        ("require", "<clock><timer name='tsc'/></clock>", True),
    ],
)
def test_invariant_tsc_needs_a_frequency(policy: str, clock: str, stays: bool) -> None:
    found = reasons(f"<domain><cpu><feature policy='{policy}' name='invtsc'/></cpu>{clock}</domain>")
    assert bool(found) is stays


COMING: dict[str, tuple[HostFacts, str]] = {
    "uuid": (
        replace(HOST, uuids=frozenset({"0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"}), names=frozenset({"billing-db-1"})),
        "host h2 already has a domain with the UUID 0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0 of guest billing-db-1",
    ),
    "name": (replace(HOST, names=frozenset({"billing-db-1"})), "host h2 already has another domain named billing-db-1"),
    "no build": (replace(HOST, builds=()), "host h2 lacks QEMU 7.2.22, which runs guest billing-db-1 (there: none)"),
    "other release": (
        replace(HOST, builds=(replace(BUILD, release="10.0.2"),)),
        "host h2 lacks QEMU 7.2.22, which runs guest billing-db-1 (there: 10.0.2)",
    ),
    "devices": (
        replace(
            HOST,
            builds=(replace(BUILD, device_types=frozenset({"virtio-net-pci"})),),
            device_types=frozenset({"virtio-net-pci", "nvme", "ivshmem-plain"}),
        ),
        f"{EMULATOR} on host h2 has no ivshmem-plain, nvme, which guest billing-db-1 uses;",
    ),
    "machine": (
        replace(HOST, builds=(replace(BUILD, machine_types=frozenset({"pc"})),)),
        f"{EMULATOR} on host h2 has no machine type pc-q35-7.2",
    ),
    "cpu": (
        replace(HOST, builds=(replace(BUILD, cpu_models=frozenset({"qemu64"})),)),
        "host h2 can't provide the CPU model Cascadelake-Server-noTSX",
    ),
    "bridge": (
        replace(HOST, bridges=frozenset({"br-int"})),
        "host h2 has no bridge or network backup for interface 52:54:00:aa:bb:02",
    ),
    "storage": (
        replace(HOST, missing_paths=frozenset({"/srv/shared/billing-db-1-data.qcow2"})),
        "host h2 does not see /srv/shared/billing-db-1-data.qcow2, disk sda of guest billing-db-1",
    ),
}


@pytest.mark.parametrize("case", COMING)
def test_what_keeps_a_guest_out(case: str) -> None:
    host, expected = COMING[case]
    (found,) = destination_obstacles(guest_of(RICH), host)
    assert found.kind is ObstacleKind.STATE
    assert found.message.startswith(expected)
    assert isinstance(refusal((found,)), PreconditionError)


def test_memory_is_another_kind() -> None:
    (found,) = destination_obstacles(guest_of(RICH), replace(HOST, memory_free_bytes=8 << 30))
    assert found == Obstacle(
        ObstacleKind.MEMORY,
        "host h2 has 8192 MiB free for guests, guest billing-db-1 needs 9216 MiB; move another guest away first",
    )
    assert isinstance(refusal((found,)), ExhaustedError)
    assert isinstance(refusal((found, replace(found, kind=ObstacleKind.STATE))), PreconditionError)


def test_memory_that_just_fits() -> None:
    assert destination_obstacles(guest_of(RICH), replace(HOST, memory_free_bytes=9 << 30)) == ()


def test_release_not_known_at_the_source() -> None:
    guest = describe(RICH, RUNNING, is_shared=SHARED, builds=())
    (found,) = destination_obstacles(guest, HOST)
    assert "list it under emulators in the configuration of the source's agent" in found.message


def test_cpu_models_that_libvirt_could_not_tell_are_no_obstacle() -> None:
    host = replace(HOST, builds=(replace(BUILD, cpu_models=frozenset()),))
    assert destination_obstacles(guest_of(RICH), host) == ()


def test_the_build_at_the_same_path_is_preferred() -> None:
    other = replace(BUILD, path="/opt/qemu")
    next_release = replace(BUILD, path="/opt/next", release="10.0.2")
    builds = (other, BUILD, next_release)
    assert choose_build(builds, release="7.2.22", path=EMULATOR) == BUILD
    assert choose_build(builds, release="7.2.22", path="/elsewhere") == other
    assert choose_build(builds, release="10.0.2", path=EMULATOR) == next_release
    assert choose_build(builds, release="9.0.0", path=EMULATOR) is None
