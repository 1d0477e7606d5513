"""A fabric of bridges that do what our flows say: an interpreter for them, and the hosts, tunnels and guests around."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from handoff_agent.network.flow import (
    ETH_ARP,
    ETH_IPV4,
    IN_PORT,
    CopyField,
    Field,
    Flow,
    Goto,
    Output,
    PopVlan,
    PushVlan,
    SetField,
    ip_number,
    mac_number,
)
from handoff_agent.network.pipeline import common_flows, tenant_flows
from handoff_agent.network.treatment import Attachment, Key, Situation, treat

TUNNEL_PORT = 99
NORMAL = -1
MAX_HOPS = 8

Frame = dict[Field, int]


@dataclass(frozen=True)
class Sent:
    """What left a bridge: by which port, and how it looked."""

    port: int
    frame: tuple[tuple[Field, int], ...]


def frame(source: str, target: str, address: str = "", tagged: int = 0) -> Frame:
    """An IPv4 frame from MAC to MAC; an untagged one has VLAN_VID 0."""
    return {
        Field.ETH_SRC: mac_number(source),
        Field.ETH_DST: mac_number(target),
        Field.ETH_TYPE: ETH_IPV4,
        Field.IPV4_SRC: ip_number(address or "0.0.0.0"),
        Field.IP_PROTO: 6,
        Field.VLAN_VID: tagged,
    }


def arp_request(source: str, address: str, wanted: str) -> Frame:
    """Who has `wanted`?"""
    return {
        Field.ETH_SRC: mac_number(source),
        Field.ETH_DST: 0xFFFFFFFFFFFF,
        Field.ETH_TYPE: ETH_ARP,
        Field.ARP_OP: 1,
        Field.ARP_SHA: mac_number(source),
        Field.ARP_SPA: ip_number(address),
        Field.ARP_THA: 0,
        Field.ARP_TPA: ip_number(wanted),
        Field.VLAN_VID: 0,
    }


def process(flows: frozenset[Flow], frame: Frame, in_port: int) -> list[Sent]:
    """What a bridge with these flows, and NORMAL below them in table 0, sends."""
    packet = {Field.TUNNEL_ID: 0, **frame, Field.IN_PORT: in_port}
    table, sent = 0, []
    while True:
        flow = _lookup(flows, table, packet)
        if flow is None:
            return [*sent, Sent(NORMAL, ())] if table == 0 else sent
        goto = None
        for action in flow.actions:
            match action:
                case SetField(field=name, value=value):
                    packet[name] = value
                case CopyField(source=source, target=target):
                    packet[target] = packet.get(source, 0)
                case PushVlan():
                    packet[Field.VLAN_VID] = 0x1000
                case PopVlan():
                    packet[Field.VLAN_VID] = 0
                case Output(port=port):
                    out = in_port if port == IN_PORT else port
                    if port != in_port:
                        sent.append(Sent(out, tuple(sorted(packet.items(), key=lambda item: item[0].name))))
                case Goto(table=next_table):
                    assert next_table > table
                    goto = next_table
        if goto is None:
            return sent
        table = goto


def _lookup(flows: frozenset[Flow], table: int, packet: Frame) -> Flow | None:
    matching = [flow for flow in flows if flow.table == table and _matches(flow, packet)]
    if not matching:
        return None
    best = max(flow.priority for flow in matching)
    first, *others = [flow for flow in matching if flow.priority == best]
    assert not others, f"two flows of one priority match: {first} and {others}"
    return first


def _matches(flow: Flow, packet: Frame) -> bool:
    return all(
        each.field in packet
        and (packet[each.field] == each.value if each.mask is None else packet[each.field] & each.mask == each.value)
        for each in flow.match
    )


@dataclass(frozen=True)
class Guest:
    """A port of a tenant, and where it is by the record."""

    key: Key
    address: str
    host: str
    uuid: str


@dataclass
class Fabric:
    """Hosts by their tunnel endpoint. `situations` and `arriving` are what a handoff makes of guests."""

    hosts: Sequence[str]
    guests: Sequence[Guest]
    situations: dict[tuple[str, str], Situation] = field(default_factory=dict)
    recorded: dict[tuple[str, str], str] = field(default_factory=dict)
    """Where a host thinks that a guest is, if it has not heard the newest."""
    arriving: dict[str, str] = field(default_factory=dict)

    def flows(self, host: str) -> frozenset[Flow]:
        tenants: dict[int, list[Attachment]] = {}
        for guest in self.guests:
            where = self.recorded.get((host, guest.uuid), guest.host)
            to = self.arriving.get(guest.uuid, "")
            attachment = Attachment(
                guest.key,
                (guest.address,),
                location="" if where == host else where,
                arriving="" if to in (host, where) else to,
                domain_uuid=guest.uuid,
            )
            tenants.setdefault(guest.key.tunnel, []).append(attachment)
        found = common_flows(TUNNEL_PORT)
        for members in tenants.values():
            ports = [treat(each, self.situation(host, each.domain_uuid)) for each in members]
            found |= tenant_flows(ports, TUNNEL_PORT)
        return found

    def situation(self, host: str, uuid: str) -> Situation:
        return self.situations.get((host, uuid), Situation())

    def deliver(self, host: str, in_port: int, frame: Mapping[Field, int]) -> list[tuple[str, int, Frame]]:
        """All taps that a frame reaches: host, OpenFlow port, and how the frame looks there."""
        flows = {each: self.flows(each) for each in self.hosts}
        reached = []
        waiting = [(host, in_port, dict(frame), 0)]
        while waiting:
            at, port, packet, hops = waiting.pop()
            assert hops < MAX_HOPS, "a frame goes round"
            for sent in process(flows[at], packet, port):
                seen = dict(sent.frame)
                if sent.port == TUNNEL_PORT:
                    to = _address(seen.pop(Field.TUNNEL_DST))
                    assert to in self.hosts and to != at, f"{at} sends into a tunnel to {to}"
                    waiting.append((to, TUNNEL_PORT, seen, hops + 1))
                else:
                    reached.append((at, sent.port, seen))
        return reached


def _address(number: int) -> str:
    return ".".join(str(number >> shift & 255) for shift in (24, 16, 8, 0))
