"""Why a guest can't be handed over now. Pure; every reason is a sentence that says what to do.

`obstacles` is asked at the source, `destination_obstacles` at the destination. The list follows libvirt's own checks
(qemuMigrationSrcIsAllowed) and adds what would lose data or connections although QEMU would let it go.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from lxml import etree

from handoff.agent.v1 import types_pb2 as types
from handoff_agent.builds import Build, choose_build
from handoff_agent.guests import IsShared, is_local, layers, parse_domain
from handoff_common.errors import ExhaustedError, HandoffError, PreconditionError


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """What the API's Domain does not tell of a guest at the source."""

    live_xml: str
    """XMLDesc(0). Not the migratable XML: that one has no backing chains and no mirrors."""
    block_jobs: tuple[str, ...] = ()
    """Targets of disks that have a block job."""
    snapshots: int = 0
    checkpoints: int = 0
    blocked_reasons: tuple[str, ...] = ()
    """QEMU's own: `blocked-reasons` of query-migrate."""


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a guest needs to know of the host that it wants to come to."""

    name: str
    memory_free_bytes: int
    names: frozenset[str]
    """Names of the domains in the slot that the guest would use, defined or running."""
    uuids: frozenset[str]
    """UUIDs of the domains in all slots."""
    builds: tuple[Build, ...]
    bridges: frozenset[str]
    """Bridges (Linux and Open vSwitch) and active libvirt networks."""
    missing_paths: frozenset[str] = frozenset()
    """Those of the guest's shared images that can't be found here."""
    emulator: str = ""
    """Name of the build that the guest shall get; empty: one of the release that it runs under."""
    device_types: frozenset[str] = frozenset()
    """Of the guest's own devices; empty when not known."""


class ObstacleKind(Enum):
    """What an obstacle means to the caller."""

    MEMORY = "memory"
    STATE = "state"


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One reason, and what to do."""

    kind: ObstacleKind
    message: str


def obstacles(guest: types.Domain, facts: SourceFacts, *, is_shared: IsShared, local: bool = False) -> tuple[str, ...]:
    """Every reason why the guest can't leave now; empty when it can. Raises InvalidArgumentError for broken XML.

    `local`: it stays on this host and only changes its slot, so that disks of this host are no obstacle.
    """
    root = parse_domain(facts.live_xml)
    found = [
        *_state_obstacles(guest, facts),
        *_disk_obstacles(root, _everything if local else is_shared),
        *(() if local else _volume_obstacles(root)),
        *(message for check in _DEVICE_CHECKS for message in check(root)),
        *(_slot_obstacles(root) if local else ()),
    ]
    return tuple(f"guest {guest.name}: {message}" for message in found)


def destination_obstacles(guest: types.Domain, host: HostFacts) -> tuple[Obstacle, ...]:
    """Every reason why the host can't take the guest now; empty when it can."""
    state = (Obstacle(ObstacleKind.STATE, message) for message in _host_state_obstacles(guest, host))
    return (*_memory_obstacles(guest, host), *state)


def refusal(found: tuple[Obstacle, ...]) -> HandoffError | None:
    """The error for these obstacles: ExhaustedError when only memory lacks, else PreconditionError; None for none."""
    if not found:
        return None
    message = "; ".join(obstacle.message for obstacle in found)
    only_memory = all(obstacle.kind is ObstacleKind.MEMORY for obstacle in found)
    return ExhaustedError(message) if only_memory else PreconditionError(message)


def _state_obstacles(guest: types.Domain, facts: SourceFacts) -> Iterator[str]:
    if guest.state not in (types.DOMAIN_STATE_RUNNING, types.DOMAIN_STATE_PAUSED):
        yield "it is neither running nor paused; start it first, or define it at the destination and start it there"
    if facts.snapshots:
        yield f"it has {facts.snapshots} snapshots, which libvirt can't move; delete them (virsh snapshot-delete)"
    if facts.checkpoints:
        yield f"it has {facts.checkpoints} checkpoints, which libvirt can't move; delete them (virsh checkpoint-delete)"
    for target in facts.block_jobs:
        yield f"disk {target} has a block job; wait until it ends, or cancel it (virsh blockjob --abort)"
    for reason in facts.blocked_reasons:
        yield f"QEMU refuses to migrate it: {reason}"


def _disk_obstacles(root: etree._Element, is_shared: IsShared) -> Iterator[str]:
    for disk in root.iterfind("devices/disk"):
        target = _attribute(disk, "target", "dev")
        device = disk.get("device", "disk")
        top, *backing = layers(disk)
        if disk.find("mirror") is not None:
            yield f"disk {target} is being mirrored; wait until the block job ends, or cancel it"
        if disk.find("transient") is not None:
            yield f"disk {target} is transient: its changes exist in this host only; they would be lost"
        if device == "lun" and disk.find("source/reservations") is not None:
            yield f"disk {target} is a LUN with SCSI reservations, which are held by this host; remove <reservations>"
        if not top.source:
            continue
        if is_local(top, is_shared):
            continue  # for the planner of disks: disks/plan.py
        for layer in backing:
            if is_local(layer, is_shared):
                yield (
                    f"disk {target} is backed by {layer.source} on this host alone; pull the backing image in"
                    " (virsh blockpull), or move it to shared storage"
                )


# Written through, or always the same for every client: nothing is left in the host's own caches. As libvirt judges.
_COHERENT_CACHES = ("none", "directsync")
_COHERENT_PROTOCOLS = ("rbd",)


def _volume_obstacles(root: etree._Element) -> Iterator[str]:
    for disk in root.iterfind("devices/disk[@type='network']"):
        target = _attribute(disk, "target", "dev")
        protocol, cache = _attribute(disk, "source", "protocol"), _attribute(disk, "driver", "cache")
        read_only = disk.get("device") == "cdrom" or disk.find("readonly") is not None
        if cache not in _COHERENT_CACHES and protocol not in _COHERENT_PROTOCOLS and not read_only:
            yield (
                f"disk {target} is a {protocol} volume with cache={cache or 'default'}, so that two hosts could see"
                " different bytes; set cache='none' and restart the guest"
            )
        for host in disk.iterfind("source/host[@transport='unix']"):
            yield (
                f"disk {target} is a {protocol} volume behind the socket {host.get('socket')} of this host; name its"
                " server by address"
            )


def _everything(_path: str) -> bool:
    return True


# What each slot has for itself: its own folder is mounted there.
_SLOT_FOLDERS = ("/var/lib/libvirt/", "/etc/libvirt/", "/run/libvirt/", "/var/run/libvirt/")
_GENERATED_TAPS = ("vnet", "vif", "macvtap", "macvlan")


def _slot_obstacles(root: etree._Element) -> Iterator[str]:
    """What two QEMUs of one host can't have both, and what the other slot does not see."""
    for interface in root.iterfind("devices/interface"):
        tap = _attribute(interface, "target", "dev")
        if tap and not tap.startswith(_GENERATED_TAPS):
            yield (
                f"interface {_attribute(interface, 'mac', 'address')} has the tap {tap}, named by its operator, which"
                " two QEMUs can't open; leave <target dev> out and restart the guest, or move it to another host"
            )
    for element in root.iterfind("devices/graphics"):
        if element.get("autoport") != "yes" and element.get("port", "-1") not in ("", "-1", "0"):
            yield f"its {element.get('type')} display has the fixed port {element.get('port')}; use autoport"
        if element.get("socket") or element.find("listen[@type='socket'][@socket]") is not None:
            yield f"its {element.get('type')} display has a socket of its own, which two QEMUs can't open; use autoport"
    for tag in ("serial", "parallel", "channel"):
        for device in root.iterfind(f"devices/{tag}"):
            source = device.find("source[@mode='bind']")
            generated = source is not None and source.get("path", "").startswith(_SLOT_FOLDERS)
            if source is not None and not generated:
                where = source.get("path") or f"{source.get('host')}:{source.get('service')}"
                yield f"{tag} {_alias(device)} listens at {where}, where two QEMUs can't listen; detach it"
    paths = [root.findtext(f"os/{tag}", "") for tag in ("loader", "nvram", "kernel", "initrd", "dtb")]
    paths += [layer.source for disk in root.iterfind("devices/disk") for layer in layers(disk)]
    for path in paths:
        if path.startswith(_SLOT_FOLDERS):
            yield f"{path} is in a folder that each slot has for itself; move it elsewhere, and change the definition"


def _hostdev_obstacles(root: etree._Element) -> Iterator[str]:
    for hostdev in root.iterfind("devices/hostdev"):
        kind = hostdev.get("type") or hostdev.get("mode", "")
        yield f"a {kind} device of this host is passed through ({_alias(hostdev)}); detach it (virsh detach-device)"
    for redirected in root.iterfind("devices/smartcard[@mode='host']"):
        yield f"this host's smart card is passed through ({_alias(redirected)}); detach it"
    for tag in ("serial", "parallel", "console", "channel"):
        for device in root.iterfind(f"devices/{tag}[@type='dev']"):
            if tag == "console" and _attribute(device, "target", "type") == "serial":
                continue  # the first serial port, shown twice
            yield f"{tag} {_alias(device)} is {_attribute(device, 'source', 'path')} of this host; detach it"


# Of the others libvirt or QEMU themselves know better ("user" keeps its state, though not its outside connections).
_HOST_BOUND_INTERFACES = {
    "hostdev": "passes a device of this host through",
    "direct": "is a macvtap on a device of this host",
    "vdpa": "uses a vDPA device of this host",
    "vhostuser": "uses a vhost-user socket of this host",
}


def _interface_obstacles(root: etree._Element) -> Iterator[str]:
    for interface in root.iterfind("devices/interface"):
        if why := _HOST_BOUND_INTERFACES.get(interface.get("type", "")):
            yield f"interface {_attribute(interface, 'mac', 'address')} {why}; plug it into a bridge, or detach it"


def _shared_memory_obstacles(root: etree._Element) -> Iterator[str]:
    for shmem in root.iterfind("devices/shmem"):
        if shmem.get("role") != "master":
            yield f"shmem {shmem.get('name')} is shared with other guests of this host; detach it, or use role='master'"


def _filesystem_obstacles(root: etree._Element) -> Iterator[str]:
    for filesystem in root.iterfind("devices/filesystem"):
        share = _attribute(filesystem, "target", "dir")
        yield f"filesystem {share} is a folder of this host; unmount it in the guest and detach it"


def _memory_device_obstacles(root: etree._Element) -> Iterator[str]:
    for memory in root.iterfind("devices/memory"):
        model = memory.get("model", "")
        if model in ("nvdimm", "virtio-pmem"):
            yield f"{model} {_alias(memory)} keeps its data in a file of this host; detach it"
        elif model == "sgx-epc":
            yield "it uses an SGX enclave, which can't leave its CPU; shut the guest down to move it"
        elif model == "dimm" and memory.find("address[@type='dimm']") is None:
            yield f"dimm {_alias(memory)} has no slot and base address; restart the guest so that libvirt sets them"


def _tpm_obstacles(root: etree._Element) -> Iterator[str]:
    for backend in root.iterfind("devices/tpm/backend"):
        if backend.get("type") == "emulator":
            yield "the state of its TPM is on this host: moving it is not built yet; shut the guest down to move it"
        else:
            yield f"its TPM ({backend.get('type')}) belongs to this host; remove it"


def _cpu_obstacles(root: etree._Element) -> Iterator[str]:
    if (security := root.find("launchSecurity")) is not None:
        yield f"its memory is encrypted by the CPU ({security.get('type')}); shut the guest down to move it"
    invariant = root.find("cpu/feature[@name='invtsc']")
    has_frequency = root.find("clock/timer[@name='tsc'][@frequency]") is not None
    if invariant is not None and invariant.get("policy") in ("require", "force") and not has_frequency:
        yield "its CPU has invtsc without a TSC frequency; set <timer name='tsc' frequency='…'/>, or drop invtsc"


_DEVICE_CHECKS: tuple[Callable[[etree._Element], Iterator[str]], ...] = (
    _hostdev_obstacles,
    _interface_obstacles,
    _shared_memory_obstacles,
    _filesystem_obstacles,
    _memory_device_obstacles,
    _tpm_obstacles,
    _cpu_obstacles,
)


def _memory_obstacles(guest: types.Domain, host: HostFacts) -> Iterator[Obstacle]:
    if guest.memory_bytes > host.memory_free_bytes:
        yield Obstacle(
            ObstacleKind.MEMORY,
            f"host {host.name} has {_mib(host.memory_free_bytes)} MiB free for guests, guest {guest.name} needs"
            f" {_mib(guest.memory_bytes)} MiB; move another guest away first",
        )


def _host_state_obstacles(guest: types.Domain, host: HostFacts) -> Iterator[str]:
    if guest.uuid in host.uuids:
        yield (
            f"host {host.name} already has a domain with the UUID {guest.uuid} of guest {guest.name}; if it is a"
            f" leftover, remove it there (virsh undefine {guest.uuid})"
        )
    elif guest.name in host.names:
        yield f"host {host.name} already has another domain named {guest.name}; rename or remove it there"
    yield from _build_obstacles(guest, host)
    for interface in guest.interfaces:
        if interface.source and interface.source not in host.bridges:
            yield (
                f"host {host.name} has no bridge or network {interface.source} for interface {interface.mac} of guest"
                f" {guest.name}; create it there"
            )
    for disk in guest.disks:
        if disk.placement == types.DISK_PLACEMENT_SHARED and disk.source in host.missing_paths:
            yield (
                f"host {host.name} does not see {disk.source}, disk {disk.target} of guest {guest.name}; mount the"
                " shared storage there"
            )


def _build_obstacles(guest: types.Domain, host: HostFacts) -> Iterator[str]:
    if host.emulator:
        build = next((build for build in host.builds if build.name == host.emulator), None)
        if build is None:
            known = ", ".join(build.name for build in host.builds) or "none"
            yield f"host {host.name} has no QEMU build named {host.emulator} (there: {known})"
        else:
            yield from _fit_obstacles(guest, host, build)
        return
    if not guest.qemu_release:
        yield (
            f"the QEMU release of {guest.emulator}, which runs guest {guest.name}, is not known; list it under"
            " emulators in the configuration of the source's agent"
        )
        return
    build = choose_build(host.builds, release=guest.qemu_release, path=guest.emulator)
    if build is None:
        known = ", ".join(sorted({build.release for build in host.builds})) or "none"
        yield (
            f"host {host.name} lacks QEMU {guest.qemu_release}, which runs guest {guest.name} (there: {known}); install"
            " that release there, or upgrade the guest on its own host first"
        )
        return
    yield from _fit_obstacles(guest, host, build)


def _fit_obstacles(guest: types.Domain, host: HostFacts, build: Build) -> Iterator[str]:
    if guest.machine_type not in build.machine_types:
        yield (
            f"{build.path} on host {host.name} has no machine type {guest.machine_type}, which guest {guest.name} uses;"
            " install a build that has it"
        )
    lacking = host.device_types - build.device_types if build.device_types else frozenset()
    if lacking:
        yield (
            f"{build.path} on host {host.name} has no {', '.join(sorted(lacking))}, which guest {guest.name} uses;"
            " detach that, or install a build that has it"
        )
    is_named_model = guest.cpu_model not in ("", "host-passthrough", "host-model", "maximum")
    if is_named_model and build.cpu_models and guest.cpu_model not in build.cpu_models:
        yield (
            f"host {host.name} can't provide the CPU model {guest.cpu_model} of guest {guest.name}; choose a host with"
            " a newer CPU, or give the guest an older model"
        )


def _attribute(parent: etree._Element, tag: str, attribute: str) -> str:
    child = parent.find(tag)
    return "" if child is None else child.get(attribute, "")


def _alias(device: etree._Element) -> str:
    return _attribute(device, "alias", "name") or "without alias"


def _mib(size_bytes: int) -> int:
    return size_bytes >> 20
