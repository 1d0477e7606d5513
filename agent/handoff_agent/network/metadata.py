"""A guest's ports in its tenants' networks, as its libvirt definition tells them. Pure.

    <metadata>
      <handoff:network xmlns:handoff="https://handoff.example/network/1">
        <handoff:port mac="52:54:00:30:00:0a" tunnel="1001" ip="10.30.0.10 10.30.0.11"/>
      </handoff:network>
    </metadata>

A port for each interface, by its MAC; one without an address may use any. One that is written wrongly is nobody's: its
interface is a tenant's, and must not be the site's.
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
NO_TUNNEL: Final = 0
"""Of a port whose tenant can't be read."""
_MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


def read_ports(root: etree._Element) -> tuple[Attachment, ...]:
    """The ports of a <domain>, here, without those that are written wrongly."""
    return tuple(port for port in read_claims(root) if port.key.tunnel != NO_TUNNEL)


def read_claims(root: etree._Element) -> tuple[Attachment, ...]:
    """As `read_ports`, with those that are written wrongly, if only their MAC is known; they are logged."""
    uuid, name = root.findtext("uuid", "").strip().lower(), root.findtext("name", "")
    found = []
    for element in root.iterfind(f"metadata/{{{NAMESPACE}}}network/{{{NAMESPACE}}}port"):
        mac = element.get("mac", "")
        try:
            found.append(make_attachment(mac, element.get("tunnel", ""), element.get("ip", ""), uuid, name))
        except ValueError as error:
            log.warning("a port in a guest's metadata is wrong: nothing passes by it", guest=name, error=str(error))
            if _MAC.fullmatch(mac.lower()):
                found.append(Attachment(Key(NO_TUNNEL, mac.lower()), domain_uuid=uuid, name=name))
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
