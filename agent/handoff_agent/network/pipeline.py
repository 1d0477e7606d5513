"""What a host's bridge must do with the frames of tenants, as flows. Pure: ports in, flows out.

    table 0    classifier   in_port=TAP               tenant := tunnel id            -> 200
                            in_port=TUNNEL, tun_id=T                                 -> 203
                            in_port=TUNNEL            drop
                            in_port=TAP, closed       drop
                            (everything else is the site's)
    table 200  guard        a frame of the port's own MAC and addresses, untagged    -> 201
    table 201  ARP          a broadcast request for a known address is answered, else  -> 202
    table 202  from ports   by MAC to a tap or a tunnel; group frames to all taps and tunnels of the tenant
    table 203  from tunnels by MAC to a tap; group frames to all taps of the tenant

What came out of a tunnel goes into one only on its way to a guest that has just left (`Relay`), and only to where it
is: so no frame can go round. While a guest moves, group frames reach it through its source alone, each as a copy
with a VLAN tag that only its new tap takes: the other taps at the destination have their own.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from types import MappingProxyType
from typing import Final, TypeAlias

from handoff_agent.network.flow import (
    BROADCAST,
    ETH_ARP,
    ETH_IPV4,
    ETH_IPV6,
    ETH_RARP,
    GROUP_BIT,
    IN_PORT,
    VLAN_PRESENT,
    Action,
    CopyField,
    Field,
    Flow,
    Goto,
    Is,
    Match,
    Output,
    PopVlan,
    PushVlan,
    SetField,
    ip_number,
    mac_number,
)

CLASSIFIER: Final = 0
GUARD: Final = 200
ARP: Final = 201
FROM_PORTS: Final = 202
FROM_TUNNELS: Final = 203

CLASSIFIER_PRIORITY: Final = 64000
"""In the table that we share with the site: above what is the site's own."""
OTHERS_PRIORITY: Final = CLASSIFIER_PRIORITY - 1
_SPECIAL, _USUAL, _LAST = 300, 200, 100

# To a MAC that no port has, of the type for local experiments (IEEE 802): the other host drops it.
NOBODYS_FRAME: Final = bytes.fromhex("02000000000002000000000188b5").ljust(60, b"\0")

NONE_CLOSED: Final[Mapping[int, int]] = MappingProxyType({})

_UDP: Final = 17
_DHCP_CLIENT, _DHCP_SERVER = 68, 67
_REQUEST, _REPLY = 1, 2
_UNTAGGED: Final = Is(Field.VLAN_VID, 0)
_GROUP: Final = Is(Field.ETH_DST, GROUP_BIT, GROUP_BIT)
_TAGS: Final = 4094


@dataclass(frozen=True, slots=True)
class Tap:
    """A port of this bridge, by its OpenFlow number."""

    ofport: int


@dataclass(frozen=True, slots=True)
class Tunnel:
    """Another host, by the address of its tunnel endpoint."""

    address: str


Place: TypeAlias = Tap | Tunnel


@dataclass(frozen=True, slots=True)
class Port:
    """A tenant's port as this host treats it now; see treatment.py for which guest gets which."""

    mac: str
    tunnel: int
    addresses: tuple[str, ...] = ()
    any_source: bool = False
    senders: tuple[int, ...] = ()
    """OpenFlow ports that it may send by."""
    place: Place | None = None
    """Where frames of this host's ports go."""
    from_tunnels: Place | None = None
    """Where frames out of a tunnel go; a Tunnel relays them."""
    groups: Place | None = None
    """Where group frames go as they are (a Tap), or as marked copies (a Tunnel)."""
    marked: Tap | None = None
    """What takes marked copies."""
    arriving: str = ""
    """Tunnel endpoint of a host that it is on its way to: group frames of the tenant go there too."""

    @property
    def present(self) -> bool:
        """This host has something to do with its frames."""
        return bool(self.senders) or self.from_tunnels is not None or self.marked is not None


def common_flows(tunnel_port: int | None, closed: Mapping[int, int] = NONE_CLOSED) -> frozenset[Flow]:
    """What all tenants share. `tunnel_port`: OpenFlow number of the port to the other hosts, if there is one.

    `closed`: numbers of guests' ports that may send nothing, with the seconds for which that holds; 0: for ever.
    """
    # So that what is dropped is counted.
    dropped = {Flow(table, 0, ()) for table in (GUARD, FROM_PORTS, FROM_TUNNELS)}
    if tunnel_port is not None:
        dropped.add(Flow(CLASSIFIER, OTHERS_PRIORITY, (Is(Field.IN_PORT, tunnel_port),)))
    for number, lifetime_s in closed.items():
        # The priority of a port that is open: one takes the place of the other.
        dropped.add(Flow(CLASSIFIER, CLASSIFIER_PRIORITY, (Is(Field.IN_PORT, number),), lifetime_s=lifetime_s))
    return frozenset({*dropped, Flow(ARP, 0, (), (Goto(FROM_PORTS),))})


def tenant_flows(members: Sequence[Port], tunnel_port: int | None) -> frozenset[Flow]:
    """The flows for all ports of one tenant; none when it has nothing here."""
    if not any(port.present for port in members):
        return frozenset()
    tunnel = members[0].tunnel
    found = {*_flood(tunnel, members, tunnel_port), *_marked(tunnel, members)}
    if tunnel_port is not None:
        match = (Is(Field.IN_PORT, tunnel_port), Is(Field.TUNNEL_ID, tunnel))
        found.add(Flow(CLASSIFIER, CLASSIFIER_PRIORITY, match, (Goto(FROM_TUNNELS),)))
    return frozenset(found.union(*(_port_flows(port, tunnel_port) for port in members)))


@lru_cache(maxsize=1 << 16)
def _port_flows(port: Port, tunnel_port: int | None) -> frozenset[Flow]:
    """Cached: of a large tenant, one port changes at a time, and a guest may wait for it."""
    return frozenset(chain(_guard(port), _answers(port), _delivery(port, tunnel_port)))


def scout(tunnel: int, address: str, tunnel_port: int) -> tuple[SetField | Output, ...]:
    """What is done with a frame that only tries the way to another host."""
    return (
        SetField(Field.TUNNEL_ID, tunnel),
        SetField(Field.TUNNEL_DST, ip_number(address)),
        Output(tunnel_port),
    )


def mark(mac: str) -> int:
    """The VLAN id of marked copies for a port: the same at both hosts, and for one in 4094 of the others."""
    return 1 + zlib.crc32(mac_number(mac).to_bytes(6)) % _TAGS


def _guard(port: Port) -> Iterator[Flow]:
    mac = mac_number(port.mac)
    for sender in port.senders:
        tenant = (SetField(Field.TUNNEL_ID, port.tunnel), Goto(GUARD))
        yield Flow(CLASSIFIER, CLASSIFIER_PRIORITY, (Is(Field.IN_PORT, sender),), tenant)
        own = (Is(Field.IN_PORT, sender), Is(Field.ETH_SRC, mac))
        for match in chain(_permitted_arp(port, mac), _permitted_ip(port)):
            yield Flow(GUARD, _USUAL, (*own, *match, _UNTAGGED), (Goto(ARP),))


def _permitted_arp(port: Port, mac: int) -> Iterator[Match]:
    arp = (Is(Field.ETH_TYPE, ETH_ARP), Is(Field.ARP_SHA, mac))
    if port.addresses:
        # A sender of 0.0.0.0 asks whether an address is free (RFC 5227).
        yield from ((*arp, Is(Field.ARP_SPA, ip_number(each))) for each in (*port.addresses, "0.0.0.0"))  # noqa: S104
    else:
        yield arp
    yield (Is(Field.ETH_TYPE, ETH_RARP), Is(Field.ARP_SHA, mac))


def _permitted_ip(port: Port) -> Iterator[Match]:
    ipv4 = Is(Field.ETH_TYPE, ETH_IPV4)
    if port.any_source:
        yield (ipv4,)
    elif port.addresses:
        yield from ((ipv4, Is(Field.IPV4_SRC, ip_number(each))) for each in port.addresses)
        to_dhcp = (Is(Field.IP_PROTO, _UDP), Is(Field.UDP_SRC, _DHCP_CLIENT), Is(Field.UDP_DST, _DHCP_SERVER))
        yield (ipv4, Is(Field.IPV4_SRC, 0), *to_dhcp)
    else:
        yield from ((Is(Field.ETH_TYPE, kind),) for kind in (ETH_IPV4, ETH_IPV6))


def _answers(port: Port) -> Iterator[Flow]:
    """A guest that asks for its own address looks for another that has it: that is for the others to answer."""
    mac = mac_number(port.mac)
    for address in port.addresses:
        asks = (
            Is(Field.TUNNEL_ID, port.tunnel),
            Is(Field.ETH_DST, BROADCAST),
            Is(Field.ETH_TYPE, ETH_ARP),
            Is(Field.ARP_OP, _REQUEST),
            Is(Field.ARP_TPA, ip_number(address)),
        )
        for sender in port.senders:
            yield Flow(ARP, _SPECIAL, (Is(Field.IN_PORT, sender), *asks), (Goto(FROM_PORTS),))
        answer = (
            CopyField(Field.ETH_SRC, Field.ETH_DST),
            SetField(Field.ETH_SRC, mac),
            SetField(Field.ARP_OP, _REPLY),
            CopyField(Field.ARP_SHA, Field.ARP_THA),
            CopyField(Field.ARP_SPA, Field.ARP_TPA),
            SetField(Field.ARP_SHA, mac),
            SetField(Field.ARP_SPA, ip_number(address)),
            Output(IN_PORT),
        )
        yield Flow(ARP, _USUAL, asks, answer)


def _delivery(port: Port, tunnel_port: int | None) -> Iterator[Flow]:
    for_it = (Is(Field.TUNNEL_ID, port.tunnel), Is(Field.ETH_DST, mac_number(port.mac)))
    if (actions := _send(port.place, tunnel_port)) is not None:
        yield Flow(FROM_PORTS, _USUAL, for_it, actions)
    if (actions := _send(port.from_tunnels, None if tunnel_port is None else IN_PORT)) is not None:
        yield Flow(FROM_TUNNELS, _USUAL, for_it, actions)


def _send(place: Place | None, tunnel_port: int | None) -> tuple[Action, ...] | None:
    match place:
        case Tap(ofport=ofport):
            return (Output(ofport),)
        case Tunnel(address=address) if tunnel_port is not None:
            return (SetField(Field.TUNNEL_DST, ip_number(address)), Output(tunnel_port))
        case _:
            return None


def _flood(tunnel: int, members: Sequence[Port], tunnel_port: int | None) -> Iterator[Flow]:
    group = (Is(Field.TUNNEL_ID, tunnel), _GROUP, _UNTAGGED)
    taps = sorted({port.groups.ofport for port in members if isinstance(port.groups, Tap)})
    to_taps = [Output(tap) for tap in taps]
    others: set[str] = set()
    for port in members:
        others.update([port.place.address] if isinstance(port.place, Tunnel) else [])
        others.update([port.arriving] if port.arriving else [])
    to_others: list[Action] = []
    if tunnel_port is not None:
        for address in sorted(others):
            to_others += [SetField(Field.TUNNEL_DST, ip_number(address)), Output(tunnel_port)]
    yield Flow(FROM_PORTS, _LAST, group, (*to_taps, *to_others, *_marked_copies(members, tunnel_port)))
    back = None if tunnel_port is None else IN_PORT
    yield Flow(FROM_TUNNELS, _LAST, group, (*to_taps, *_marked_copies(members, back)))
    for port in members:
        if isinstance(port.groups, Tunnel):
            # It runs there already: what it sends must not come back to it.
            others_copies = _marked_copies([each for each in members if each != port], back)
            from_it = (*group, Is(Field.ETH_SRC, mac_number(port.mac)))
            yield Flow(FROM_TUNNELS, _LAST + 1, from_it, (*to_taps, *others_copies))


def _marked(tunnel: int, members: Sequence[Port]) -> Iterator[Flow]:
    """Ports of one mark are of one guest, and move together: see Network.expect."""
    taps: dict[int, list[int]] = {}
    for port in members:
        if port.marked is not None:
            taps.setdefault(mark(port.mac), []).append(port.marked.ofport)
    for tag, numbers in taps.items():
        match = (Is(Field.TUNNEL_ID, tunnel), _GROUP, Is(Field.VLAN_VID, VLAN_PRESENT | tag))
        yield Flow(FROM_TUNNELS, _SPECIAL, match, (PopVlan(), *map(Output, sorted(numbers))))


def _marked_copies(members: Sequence[Port], tunnel_port: int | None) -> Iterator[Action]:
    moving = sorted({(mark(port.mac), port.groups.address) for port in members if isinstance(port.groups, Tunnel)})
    if not moving or tunnel_port is None:
        return
    yield PushVlan()
    for tag, address in moving:
        yield SetField(Field.VLAN_VID, VLAN_PRESENT | tag)
        yield SetField(Field.TUNNEL_DST, ip_number(address))
        yield Output(tunnel_port)
