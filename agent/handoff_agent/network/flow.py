"""Flows as plain data: what matches, what is done. openflow.py turns them into bytes."""

from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address
from typing import Final, TypeAlias

_BASIC: Final = 0x8000
_NICIRA: Final = 0x0001


class Field(Enum):
    """A field of a packet: its OXM class and number, and its size in bytes."""

    IN_PORT = (_BASIC, 0, 4)
    ETH_DST = (_BASIC, 3, 6)
    ETH_SRC = (_BASIC, 4, 6)
    ETH_TYPE = (_BASIC, 5, 2)
    VLAN_VID = (_BASIC, 6, 2)
    IP_PROTO = (_BASIC, 10, 1)
    IPV4_SRC = (_BASIC, 11, 4)
    UDP_SRC = (_BASIC, 15, 2)
    UDP_DST = (_BASIC, 16, 2)
    ARP_OP = (_BASIC, 21, 2)
    ARP_SPA = (_BASIC, 22, 4)
    ARP_TPA = (_BASIC, 23, 4)
    ARP_SHA = (_BASIC, 24, 6)
    ARP_THA = (_BASIC, 25, 6)
    TUNNEL_ID = (_BASIC, 38, 8)
    TUNNEL_DST = (_NICIRA, 32, 4)

    @property
    def size_bytes(self) -> int:
        """How long a value is."""
        return self.value[2]


@dataclass(frozen=True, slots=True)
class Is:
    """One condition: the field has this value, in the bits of the mask."""

    field: Field
    value: int
    mask: int | None = None


@dataclass(frozen=True, slots=True)
class SetField:
    """Writes a field."""

    field: Field
    value: int


@dataclass(frozen=True, slots=True)
class CopyField:
    """Copies one field into another of the same size."""

    source: Field
    target: Field


@dataclass(frozen=True, slots=True)
class Output:
    """Sends the packet out of a port as it is now. A packet never leaves by the port it came in on, but by IN_PORT."""

    port: int


@dataclass(frozen=True, slots=True)
class PushVlan:
    """Adds an empty 802.1Q tag."""


@dataclass(frozen=True, slots=True)
class PopVlan:
    """Takes the tag off."""


@dataclass(frozen=True, slots=True)
class Goto:
    """Goes on in a later table; only as the last action."""

    table: int


Match: TypeAlias = tuple[Is, ...]
"""Conditions that must all hold. OpenFlow wants a field after those that it depends on (ETH_TYPE before ARP_OP)."""
Action: TypeAlias = SetField | CopyField | Output | PushVlan | PopVlan | Goto

IN_PORT: Final = 0xFFFFFFF8
"""The port that the packet came in on, as the target of an Output."""

ETH_IPV4: Final = 0x0800
ETH_ARP: Final = 0x0806
ETH_RARP: Final = 0x8035
ETH_IPV6: Final = 0x86DD
VLAN_PRESENT: Final = 0x1000
BROADCAST: Final = 0xFFFFFFFFFFFF
GROUP_BIT: Final = 0x010000000000


@dataclass(frozen=True, slots=True)
class Flow:
    """One flow. A packet that matches gets the actions; without any it is dropped."""

    table: int
    priority: int
    match: Match
    actions: tuple[Action, ...] = ()
    lifetime_s: int = 0
    """The switch forgets it after so long; 0: never."""


def mac_number(mac: str) -> int:
    """A MAC address, written with colons, as a number."""
    return int(mac.replace(":", ""), 16)


def ip_number(address: str) -> int:
    """An IPv4 address as a number."""
    return int(IPv4Address(address))
