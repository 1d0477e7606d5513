"""A guest's ports in its tenants' networks, as its libvirt definition tells them. Pure.

    <metadata>
      <handoff:network xmlns:handoff="https://handoff.example/network/1">
        <handoff:port mac="52:54:00:30:00:0a" tunnel="1001" ip="10.30.0.10 10.30.0.11"/>
      </handoff:network>
    </metadata>

A port for each interface, by its MAC; one without an address may use any.
"""

import re
from ipaddress import AddressValueError, IPv4Address
from typing import Final

import structlog
from lxml import etree

from handoff_agent.network.treatment import Attachment, Key

log = structlog.get_logger()

NAMESPACE: Final = "https://handoff.example/network/1"
LARGEST_TUNNEL: Final = (1 << 24) - 1
_MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


def read_ports(root: etree._Element) -> tuple[Attachment, ...]:
    """The ports of a <domain>, here. One that is written wrongly is left out, and logged: its interface has none."""
    uuid, name = root.findtext("uuid", "").strip().lower(), root.findtext("name", "")
    found = []
    for element in root.iterfind(f"metadata/{{{NAMESPACE}}}network/{{{NAMESPACE}}}port"):
        try:
            found.append(
                make_attachment(element.get("mac", ""), element.get("tunnel", ""), element.get("ip", ""), uuid, name)
            )
        except ValueError as error:
            log.warning("a port in a guest's metadata is left out", guest=name, error=str(error))
    return tuple(found)


def make_attachment(mac: str, tunnel: str, addresses: str, uuid: str, name: str) -> Attachment:
    """A port from its attributes. Raises ValueError with what is wrong with them."""
    mac = mac.lower()
    if not _MAC.fullmatch(mac):
        raise ValueError(f"mac {mac!r}: write it like 52:54:00:30:00:0a")
    if not tunnel.isdecimal() or not 1 <= int(tunnel) <= LARGEST_TUNNEL:
        raise ValueError(f"tunnel {tunnel!r}: a number from 1 to {LARGEST_TUNNEL}")
    checked = []
    for address in addresses.split():
        try:
            checked.append(str(IPv4Address(address)))
        except AddressValueError:
            raise ValueError(f"ip {address!r} is no IPv4 address") from None
    return Attachment(Key(int(tunnel), mac), tuple(checked), domain_uuid=uuid, name=name)
