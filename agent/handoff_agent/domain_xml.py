"""A guest's XML rewritten for the host that it goes to: only what must differ changes. Pure.

Takes libvirt's migratable XML (VIR_DOMAIN_XML_MIGRATABLE | VIR_DOMAIN_XML_SECURE). libvirt leaves out of it what names
the source alone, and ignores the like when it parses XML for a new domain: the domain's id, aliases other than "ua-…",
taps called vnet…, ptys, generated sockets, ports under autoport, labels of dynamic security models, bridges behind
libvirt networks. The CPU model is spelled out in it, with check='full'.
"""

import json
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import pairwise
from typing import Final

from lxml import etree

from handoff_agent.guests import parse_domain

QEMU_NAMESPACE: Final = "http://libvirt.org/schemas/domain/qemu/1.0"
_COMMANDLINE: Final = f"{{{QEMU_NAMESPACE}}}commandline"
_AUX_RAM_SHARE: Final = "aux-ram-share="
_ARG: Final = f"{{{QEMU_NAMESPACE}}}arg"


@dataclass(frozen=True, slots=True)
class XmlChanges:
    """What differs at the destination."""

    emulator: str
    """Path of the QEMU binary there."""
    source_emulator: str
    """Path of the binary that the guest runs under now."""
    graphics_address: str | None = None
    """Address of the destination for displays that listen on one address of the source; None leaves them."""
    upgrade: bool = False
    """The definition gets `emulator` whatever it names now."""
    shares_auxiliary_ram: bool | None = None
    """`-machine aux-ram-share=on` is there afterwards, or is not; None leaves it. QEMU before 10.0 does not know it."""
    cpr_socket: str = ""
    """Where QEMU takes the descriptors of the memory; empty when the memory is copied."""


def destination_xml(live_xml: str, changes: XmlChanges) -> str:
    """The XML to create the incoming domain from: the destination's emulator, waiting with `-incoming defer`.

    `-incoming` arguments of an earlier move are replaced. Everything else stays as it was, unknown elements, comments
    and namespaces too; only quotes and character references may be written in another way. Idempotent.
    Raises InvalidArgumentError when `live_xml` isn't a domain.
    """
    root = parse_domain(live_xml)
    _set_emulator(root, changes.emulator)
    _move_displays(root, changes.graphics_address)
    _strip_incoming(root)
    _share_auxiliary_ram(root, changes.shares_auxiliary_ram)
    _add_incoming(root, changes.cpr_socket)
    return _text(root)


def persistent_xml(xml: str, changes: XmlChanges) -> str:
    """The definition to keep at the destination. Never has `-incoming`. Idempotent.

    A definition that names another emulator than the guest runs under (for its next boot) keeps it.
    Raises InvalidArgumentError when `xml` isn't a domain.
    """
    root = parse_domain(xml)
    emulator = root.find("devices/emulator")
    if changes.upgrade or emulator is None or (emulator.text or "").strip() == changes.source_emulator:
        _set_emulator(root, changes.emulator)
    _move_displays(root, changes.graphics_address)
    _strip_incoming(root)
    _share_auxiliary_ram(root, changes.shares_auxiliary_ram)
    return _text(root)


def _text(root: etree._Element) -> str:
    return etree.tostring(root.getroottree(), encoding="unicode")


def _set_emulator(root: etree._Element, path: str) -> None:
    devices = root.find("devices")
    if devices is None:
        devices = etree.SubElement(root, "devices")
    emulator = devices.find("emulator")
    if emulator is None:
        emulator = etree.Element("emulator")
        emulator.tail = devices.text
        devices.insert(0, emulator)
    if (emulator.text or "").strip() != path:
        emulator.text = path


def _move_displays(root: etree._Element, address: str | None) -> None:
    """A display bound to one address of the source would not start: QEMU can't bind it at the destination."""
    if address is None:
        return
    for graphics in root.iterfind("devices/graphics"):
        for element in (graphics, *graphics.iterfind("listen[@type='address']")):
            attribute = "listen" if element is graphics else "address"
            if _names_one_host(element.get(attribute, "")):
                element.set(attribute, address)


def _names_one_host(address: str) -> bool:
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    return not (parsed.is_unspecified or parsed.is_loopback)


def _strip_incoming(root: etree._Element) -> None:
    for commandline in root.findall(_COMMANDLINE):
        value_follows = False
        for argument in commandline.findall(_ARG):
            is_incoming = not value_follows and argument.get("value") in ("-incoming", "--incoming")
            if is_incoming or value_follows:
                _remove(argument)
            value_follows = is_incoming
    _drop_empty_commandlines(root)


def _remove(element: etree._Element) -> None:
    """Removes an element with the white space before it; text after it stays."""
    parent = element.getparent()
    assert parent is not None
    previous, tail = element.getprevious(), element.tail
    if previous is None:
        parent.text = tail
    else:
        previous.tail = tail
    parent.remove(element)


def _add_incoming(root: etree._Element, cpr_socket: str) -> None:
    _add_arguments(root, "-incoming", "defer")
    if cpr_socket:
        address = {"transport": "socket", "type": "unix", "path": cpr_socket}
        _add_arguments(root, "-incoming", json.dumps({"channel-type": "cpr", "addr": address}))


def _add_arguments(root: etree._Element, *values: str) -> None:
    commandline = root.find(_COMMANDLINE)
    if commandline is None:
        commandline = _append(root, etree.Element(_COMMANDLINE, nsmap={"qemu": QEMU_NAMESPACE}))
    for value in values:
        _append(commandline, etree.Element(_ARG, {"value": value}))


def _share_auxiliary_ram(root: etree._Element, wanted: bool | None) -> None:
    """Sees to one `-machine aux-ram-share=on`, or to none."""
    arguments = [argument for line in root.findall(_COMMANDLINE) for argument in line.findall(_ARG)]
    present = [
        (option, value)
        for option, value in pairwise(arguments)
        if option.get("value") in ("-machine", "--machine") and (value.get("value") or "").startswith(_AUX_RAM_SHARE)
    ]
    if wanted is None or (wanted and [value.get("value") for _, value in present] == [f"{_AUX_RAM_SHARE}on"]):
        return
    for option, value in present:
        _remove(option)
        _remove(value)
    if wanted:
        _add_arguments(root, "-machine", f"{_AUX_RAM_SHARE}on")
    _drop_empty_commandlines(root)


def _drop_empty_commandlines(root: etree._Element) -> None:
    for commandline in root.findall(_COMMANDLINE):
        if not len(commandline) and not (commandline.text or "").strip():
            _remove(commandline)


def _append(parent: etree._Element, child: etree._Element) -> etree._Element:
    """Appends a child, indented as its siblings are."""
    if len(parent):
        last = parent[-1]
        child.tail, last.tail = last.tail, parent.text
    parent.append(child)
    return child
