"""OpenFlow 1.4 on the wire: the few messages that we send, and what we read of the answers.

Layouts are those of the OpenFlow Switch Specification 1.4.0 and, for CopyField, of Open vSwitch's nicira-ext.h.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from hashlib import blake2b
from typing import Final

from handoff_agent.network.flow import (
    Action,
    CopyField,
    Field,
    Flow,
    Goto,
    Match,
    Output,
    PopVlan,
    PushVlan,
    SetField,
)

VERSION: Final = 5
HEADER: Final = struct.Struct("!BBHI")

COOKIE_OWNER: Final = 0x48FF << 48
"""The upper 16 bits of the cookies of our flows."""
COOKIE_OWNER_MASK: Final = 0xFFFF << 48
COOKIE_ALL: Final = 0xFFFFFFFFFFFFFFFF

_ANY: Final = 0xFFFFFFFF
_FROM_CONTROLLER: Final = 0xFFFFFFFD
_ALL_TABLES: Final = 0xFF
_NO_BUFFER: Final = 0xFFFFFFFF
_FLOW_MOD: Final = struct.Struct("!QQBBHHHIIIHH")
_NICIRA_VENDOR: Final = 0x00002320
_REG_MOVE: Final = 6
_VLAN_ETHERTYPE: Final = 0x8100
_ATOMIC_ORDERED: Final = 0b11
_NXM: Final = {
    Field.ETH_DST: (0, 1),
    Field.ETH_SRC: (0, 2),
    Field.ARP_SPA: (0, 16),
    Field.ARP_TPA: (0, 17),
    Field.ARP_SHA: (1, 17),
    Field.ARP_THA: (1, 18),
}
"""Class and number of fields that are copied, in Open vSwitch's own extension."""
_FLOW_STATS: Final = struct.Struct("!HBx8xHHHHHxxQ16x")
_TLV: Final = struct.Struct("!HBB")


class Type(IntEnum):
    """Types of messages."""

    HELLO = 0
    ERROR = 1
    ECHO_REQUEST = 2
    ECHO_REPLY = 3
    SET_CONFIG = 9
    PORT_STATUS = 12
    PACKET_OUT = 13
    FLOW_MOD = 14
    MULTIPART_REQUEST = 18
    MULTIPART_REPLY = 19
    BARRIER_REQUEST = 20
    BARRIER_REPLY = 21
    BUNDLE_CONTROL = 33
    BUNDLE_ADD = 34


class Bundle(IntEnum):
    """What a BUNDLE_CONTROL asks for; the answer has the next number."""

    OPEN = 0
    COMMIT = 4
    DISCARD = 6


class Multipart(IntEnum):
    """What a MULTIPART_REQUEST asks for."""

    FLOW = 1
    PORT_DESC = 13


@dataclass(frozen=True, slots=True)
class PortDescription:
    """A port of the bridge."""

    number: int
    name: str


@dataclass(frozen=True, slots=True)
class SeenFlow:
    """A flow of the switch that has our mark."""

    cookie: int
    is_as_made: bool
    """It is what its cookie says. Otherwise somebody has changed it, or made it."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The switch's refusal of a message."""

    kind: int
    code: int

    def __str__(self) -> str:
        return f"OpenFlow error type {self.kind}, code {self.code}"


# Messages to the switch.


def message(kind: Type, xid: int, body: bytes = b"") -> bytes:
    """A whole message."""
    return HEADER.pack(VERSION, kind, HEADER.size + len(body), xid) + body


def set_config(xid: int) -> bytes:
    """Asks for what happens to ports: Open vSwitch tells a connection to its management socket only after this."""
    return message(Type.SET_CONFIG, xid, struct.pack("!HH", 0, 128))


def bundle_control(xid: int, bundle: int, what: Bundle) -> bytes:
    """Opens, commits or discards a bundle whose changes are seen by packets all at once."""
    return message(Type.BUNDLE_CONTROL, xid, struct.pack("!IHH", bundle, what, _ATOMIC_ORDERED))


def bundle_add(xid: int, bundle: int, inner: bytes) -> bytes:
    """Puts a message into a bundle; `inner` must have the same xid."""
    return message(Type.BUNDLE_ADD, xid, struct.pack("!IHH", bundle, 0, _ATOMIC_ORDERED) + inner)


def add_flow(xid: int, flow: Flow) -> bytes:
    """Adds a flow, with its cookie; one of the same table, priority and match is replaced."""
    timeouts = (0, flow.lifetime_s)
    fixed = _FLOW_MOD.pack(cookie(flow), 0, flow.table, 0, *timeouts, flow.priority, _NO_BUFFER, _ANY, _ANY, 0, 0)
    return message(Type.FLOW_MOD, xid, fixed + _match(flow.match) + _instructions(flow.actions))


def delete_flows(xid: int, flow_cookie: int, mask: int = COOKIE_ALL) -> bytes:
    """Deletes the flows with this cookie, in all tables."""
    fixed = _FLOW_MOD.pack(flow_cookie, mask, _ALL_TABLES, 3, 0, 0, 0, _NO_BUFFER, _ANY, _ANY, 0, 0)
    return message(Type.FLOW_MOD, xid, fixed + _match(()))


def packet_out(xid: int, actions: Sequence[SetField | Output], frame: bytes) -> bytes:
    """Sends a frame of our own."""
    encoded = b"".join(map(_action, actions))
    fixed = struct.pack("!IIH6x", _NO_BUFFER, _FROM_CONTROLLER, len(encoded))
    return message(Type.PACKET_OUT, xid, fixed + encoded + frame)


def ask_flows(xid: int) -> bytes:
    """Asks for our flows."""
    body = struct.pack("!HH4xB3xII4xQQ", Multipart.FLOW, 0, _ALL_TABLES, _ANY, _ANY, COOKIE_OWNER, COOKIE_OWNER_MASK)
    return message(Type.MULTIPART_REQUEST, xid, body + _match(()))


def ask_ports(xid: int) -> bytes:
    """Asks for the bridge's ports."""
    return message(Type.MULTIPART_REQUEST, xid, struct.pack("!HH4x", Multipart.PORT_DESC, 0))


@lru_cache(maxsize=1 << 14)
def cookie(flow: Flow) -> int:
    """The flow's cookie: our mark, and a digest of all that the flow is. Equal cookies are equal flows."""
    return _cookie(flow.table, flow.priority, flow.lifetime_s, _match(flow.match), _instructions(flow.actions))


def _cookie(table: int, priority: int, lifetime_s: int, match: bytes, instructions: bytes) -> int:
    content = struct.pack("!BHH", table, priority, lifetime_s) + b"".join(_conditions(match)) + instructions
    return COOKIE_OWNER | int.from_bytes(blake2b(content, digest_size=6).digest())


def _conditions(match: bytes) -> list[bytes]:
    """In one order: a switch tells them in its own."""
    found = []
    end, position = struct.unpack_from("!2xH", match)[0], 4
    while position < end:
        length = _TLV.size + _TLV.unpack_from(match, position)[2]
        found.append(match[position : position + length])
        position += length
    return sorted(found)


# Answers.


def more_follows(body: bytes) -> bool:
    """Whether a MULTIPART_REPLY has others behind it."""
    flags: int = struct.unpack_from("!H", body, 2)[0]
    return bool(flags & 1)


def flows(body: bytes) -> Iterator[SeenFlow]:
    """The flows in a MULTIPART_REPLY."""
    position = 8
    while position < len(body):
        length, table, priority, idle_s, lifetime_s, flags, _, flow_cookie = _FLOW_STATS.unpack_from(body, position)
        match = position + _FLOW_STATS.size
        instructions = match + _padded_size(struct.unpack_from("!2xH", body, match)[0])
        is_as_made = not (idle_s or flags) and flow_cookie == _cookie(
            table, priority, lifetime_s, body[match:instructions], body[instructions : position + length]
        )
        yield SeenFlow(flow_cookie, is_as_made)
        position += length


def ports(body: bytes) -> Iterator[PortDescription]:
    """The ports in a MULTIPART_REPLY."""
    position = 8
    while position < len(body):
        yield _port(body, position)
        position += struct.unpack_from("!4xH", body, position)[0]


def port_status(body: bytes) -> tuple[bool, PortDescription]:
    """Whether the port of a PORT_STATUS is there (it was added or changed), and the port."""
    return body[0] != 1, _port(body, 8)


def failure(body: bytes) -> Failure:
    """What an ERROR says."""
    return Failure(*struct.unpack_from("!HH", body))


def _port(body: bytes, position: int) -> PortDescription:
    number, name = struct.unpack_from("!I12x16s", body, position)
    return PortDescription(number, name.rstrip(b"\0").decode(errors="replace"))


# Parts of flows.


def _oxm_header(field: Field, *, masked: bool = False) -> int:
    oxm_class, number, size = field.value
    return (oxm_class << 16) | (number << 9) | (masked << 8) | (2 * size if masked else size)


def _nxm_header(field: Field) -> int:
    """As Open vSwitch tells it, whatever it was told."""
    nxm_class, number = _NXM[field]
    return (nxm_class << 16) | (number << 9) | field.size_bytes


def _oxm(field: Field, value: int, mask: int | None = None) -> bytes:
    encoded = struct.pack("!I", _oxm_header(field, masked=mask is not None)) + value.to_bytes(field.size_bytes)
    return encoded if mask is None else encoded + mask.to_bytes(field.size_bytes)


def _match(match: Match) -> bytes:
    fields = b"".join(_oxm(each.field, each.value, each.mask) for each in match)
    return _padded(struct.pack("!HH", 1, 4 + len(fields)) + fields)


def _instructions(actions: Sequence[Action]) -> bytes:
    encoded, goto = b"", b""
    for action in actions:
        assert not goto, "Goto is the last action"
        if isinstance(action, Goto):
            goto = struct.pack("!HHB3x", 1, 8, action.table)
        else:
            encoded += _action(action)
    apply = struct.pack("!HH4x", 4, 8 + len(encoded)) + encoded if encoded else b""
    return apply + goto


def _action(action: SetField | CopyField | Output | PushVlan | PopVlan) -> bytes:
    match action:
        case Output(port=port):
            return struct.pack("!HHIH6x", 0, 16, port, 0)
        case PushVlan():
            return struct.pack("!HHH2x", 17, 8, _VLAN_ETHERTYPE)
        case PopVlan():
            return struct.pack("!HH4x", 18, 8)
        case SetField(field=field, value=value):
            tlv = _oxm(field, value)
            padded = _padded(bytes(4) + tlv)
            return struct.pack("!HH", 25, len(padded)) + padded[4:]
        case CopyField(source=source, target=target):
            bits = 8 * source.size_bytes
            headers = (_nxm_header(source), _nxm_header(target))
            return struct.pack("!HHIHHHHII", 0xFFFF, 24, _NICIRA_VENDOR, _REG_MOVE, bits, 0, 0, *headers)


def _padded(content: bytes) -> bytes:
    return content.ljust(_padded_size(len(content)), b"\0")


def _padded_size(size_bytes: int) -> int:
    return size_bytes + -size_bytes % 8
