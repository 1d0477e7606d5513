"""What libvirt's XML says of a guest, as the API's Domain. Pure: facts that the XML lacks are arguments."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import libvirt
from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from lxml import etree

from handoff.agent.v1 import types_pb2 as types
from handoff_agent.builds import Build, name_of
from handoff_agent.network.metadata import read_ports
from handoff_common.errors import InvalidArgumentError

IsShared = Callable[[str], bool]
"""Tells of an absolute path whether other hosts see the same bytes there."""

_STATES: Mapping[int, types.DomainState.ValueType] = {
    libvirt.VIR_DOMAIN_NOSTATE: types.DOMAIN_STATE_UNSPECIFIED,
    libvirt.VIR_DOMAIN_RUNNING: types.DOMAIN_STATE_RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: types.DOMAIN_STATE_RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: types.DOMAIN_STATE_PAUSED,
    libvirt.VIR_DOMAIN_SHUTOFF: types.DOMAIN_STATE_SHUT_OFF,
}


@dataclass(frozen=True, slots=True)
class GuestFacts:
    """What libvirt tells beside the XML."""

    slot: str
    state: types.DomainState.ValueType
    persistent: bool
    autostart: bool
    migration_id: str = ""
    qemu_release: str = ""
    """What its own QEMU reported, where asked: the binary may have been replaced under a running guest."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One image of a disk: its top, or what that is backed by."""

    kind: str
    """libvirt's type: "file", "block", "network", "volume", "nvme", "vhostuser"…"""
    source: str
    """Path, or "protocol:name" of a network volume. Empty when there is no medium."""
    format: str


def parse_domain(xml: str) -> etree._Element:
    """Parses a domain's XML as it is: comments, CDATA and white space stay. InvalidArgumentError if it isn't XML."""
    parser = etree.XMLParser(resolve_entities=False, no_network=True, strip_cdata=False, huge_tree=True)
    try:
        root = etree.fromstring(xml.encode(), parser)
    except etree.XMLSyntaxError as error:
        raise InvalidArgumentError(f"the domain's XML can't be parsed: {error}") from None
    if root.tag != "domain":
        raise InvalidArgumentError(f"the domain's XML begins with <{root.tag}>, not with <domain>")
    return root


def domain_state(libvirt_state: int) -> types.DomainState.ValueType:
    """The API's state for a virDomainState."""
    return _STATES.get(libvirt_state, types.DOMAIN_STATE_OTHER)


def below_any(paths: tuple[str, ...]) -> IsShared:
    """A predicate: the path is one of `paths` or lies below one. Compares components, without looking at the disk."""
    roots = tuple(PurePosixPath(path) for path in paths)

    def is_below(path: str) -> bool:
        candidate = PurePosixPath(path)
        return ".." not in candidate.parts and any(candidate.is_relative_to(root) for root in roots)

    return is_below


def describe(xml: str, facts: GuestFacts, *, is_shared: IsShared, builds: Sequence[Build]) -> types.Domain:
    """The API's Domain for libvirt's plain XML (XMLDesc(0)). `builds`: the QEMU builds of the host.

    Sizes of disks are left at 0: the XML does not have them. Raises InvalidArgumentError for what isn't a domain.
    """
    root = parse_domain(xml)
    emulator = root.findtext("devices/emulator", "").strip()
    domain = types.Domain(
        uuid=root.findtext("uuid", "").strip().lower(),
        name=root.findtext("name", ""),
        slot=facts.slot,
        state=facts.state,
        memory_bytes=_memory_bytes(root),
        vcpus=int(root.findtext("vcpu", "1")),
        cpu_model=_cpu_model(root),
        machine_type=_machine_type(root),
        emulator=emulator,
        qemu_release=facts.qemu_release or next((b.release for b in builds if b.path == emulator), ""),
        emulator_name=name_of(builds, path=emulator, running=facts.qemu_release),
        persistent=facts.persistent,
        autostart=facts.autostart,
        migration_id=facts.migration_id,
    )
    domain.disks.extend(_disk(disk, is_shared) for disk in root.iterfind("devices/disk"))
    active = facts.state not in (types.DOMAIN_STATE_SHUT_OFF, types.DOMAIN_STATE_UNSPECIFIED)
    _add_interfaces(domain.interfaces, root, active)
    return domain


def layers(disk: etree._Element) -> tuple[Layer, ...]:
    """The images of a <disk>, top first, as far as the XML tells; a chain that libvirt has not probed ends early."""
    chain = [_layer(disk)]
    backing = disk.find("backingStore")
    while backing is not None and len(backing):
        chain.append(_layer(backing))
        backing = backing.find("backingStore")
    return tuple(chain)


def is_local(layer: Layer, is_shared: IsShared) -> bool:
    """No other host can open this image by the same name."""
    match layer.kind:
        case "network":
            return False
        case "file" | "block" | "dir":
            return not is_shared(layer.source)
        case _:
            return True


def _layer(element: etree._Element) -> Layer:
    kind = element.get("type", "file")
    source = element.find("source")
    driver = element.find("driver" if element.tag == "disk" else "format")
    image_format = driver.get("type", "raw") if driver is not None else "raw"
    return Layer(kind, "" if source is None else _source_name(kind, source), image_format)


_NAMING_ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "file": ("file",),
    "block": ("dev",),
    "dir": ("dir",),
    "network": ("protocol", "name"),
    "volume": ("pool", "volume"),
}


def _source_name(kind: str, source: etree._Element) -> str:
    attributes = _NAMING_ATTRIBUTES.get(kind)
    if attributes is None:  # nvme, vhostuser, vhostvdpa
        return f"{kind}:{source.get('path') or source.get('dev') or ''}"
    return ":".join(source.get(attribute, "") for attribute in attributes)


def _disk(element: etree._Element, is_shared: IsShared) -> types.Disk:
    target = element.find("target")
    device = element.get("device", "disk")
    top = _layer(element)
    return types.Disk(
        target="" if target is None else target.get("dev", ""),
        format=top.format,
        source=top.source,
        placement=_placement(top, is_shared),
        device=device,
        read_only=device == "cdrom" or element.find("readonly") is not None,
        servers=servers(element) if top.kind == "network" else [],
    )


def servers(disk: etree._Element) -> list[str]:
    """Addresses of the servers of a <disk> on the network, each "host:port"; the port is empty where libvirt's default
    is meant."""
    hosts = disk.iterfind("source/host")
    return [f"{host.get('name')}:{host.get('port', '')}" for host in hosts if host.get("name")]


def _placement(top: Layer, is_shared: IsShared) -> types.DiskPlacement.ValueType:
    if not top.source:
        return types.DISK_PLACEMENT_EMPTY
    if top.kind == "network":
        return types.DISK_PLACEMENT_NETWORK
    return types.DISK_PLACEMENT_LOCAL if is_local(top, is_shared) else types.DISK_PLACEMENT_SHARED


def _add_interfaces(
    interfaces: RepeatedCompositeFieldContainer[types.Interface], root: etree._Element, active: bool
) -> None:
    ports = {port.key.mac: port for port in read_ports(root)}
    for element in root.iterfind("devices/interface"):
        mac, source, target = (element.find(tag) for tag in ("mac", "source", "target"))
        address = "" if mac is None else mac.get("address", "").lower()
        port = ports.get(address)
        interfaces.add(
            mac=address,
            source="" if source is None else _plugged_into(source),
            tap=target.get("dev", "") if active and target is not None else "",
            tunnel=port.key.tunnel if port else 0,
            ips=port.addresses if port else (),
        )


def _plugged_into(source: etree._Element) -> str:
    # A live interface of a libvirt network names both; the bridge is what must exist.
    for attribute in ("bridge", "network", "dev", "path"):
        if value := source.get(attribute):
            return value
    return ""


def _memory_bytes(root: etree._Element) -> int:
    """<memory>, plugged modules included; <maxMemory> is only a bound for plugging in more, often a fictitious one."""
    element = root.find("memory")
    if element is None:
        return 0
    if element.get("unit", "KiB") != "KiB":
        raise InvalidArgumentError(f"<memory> is in {element.get('unit')}; libvirt itself writes KiB")
    return int(element.text or "0") << 10


def _cpu_model(root: etree._Element) -> str:
    cpu = root.find("cpu")
    if cpu is None:
        return ""
    model = (cpu.findtext("model") or "").strip()
    return model or cpu.get("mode", "")


def _machine_type(root: etree._Element) -> str:
    element = root.find("os/type")
    return "" if element is None else element.get("machine", "")
