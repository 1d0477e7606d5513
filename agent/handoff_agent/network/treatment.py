"""How a host treats a tenant's port: where it is by the record, and what a handoff makes of that here. Pure.

    recorded at  handoff here      may send     frames of ports  out of tunnels  group frames
    here         none              tap          tap              tap             tap
    here         leaves (paused)   tap          D                relayed to D    marked copies to D
    here         leaves for slot   both taps    new tap          new tap         new tap
    S            comes             new tap      S                new tap         marked copies to new tap
    D            left (released?)  tap          D                relayed to D    -
    elsewhere    none              -            tunnel           -               -

The last row but one is what carries late senders until all have been told.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from handoff_agent.network.pipeline import Port, Tap, Tunnel

HERE: Final = ""


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """A MAC address in a tenant's network."""

    tunnel: int
    mac: str


@dataclass(frozen=True, slots=True)
class Attachment:
    """A tenant's port as the leader records it."""

    key: Key
    addresses: tuple[str, ...] = ()
    any_source: bool = False
    location: str = HERE
    """Tunnel endpoint of the host that it is on; HERE for this one."""
    arriving: str = ""
    """Tunnel endpoint of the host that it is on its way to, if another one."""
    domain_uuid: str = ""
    """The guest; empty for a port that is none."""
    name: str = ""
    """Of the guest, or of the interface when it is none."""


@dataclass(frozen=True, slots=True)
class Coming:
    """A guest that comes to this host: its new taps wait for it."""

    taps: Mapping[Key, str]


@dataclass(frozen=True, slots=True)
class Leaving:
    """A guest that leaves this host, from when it is paused on."""

    destination: str
    """Tunnel endpoint; HERE when it only changes its slot (there is a Coming, too)."""


Names: TypeAlias = Mapping[Key, str]
"""The interfaces of ports that are here."""
Numbers: TypeAlias = Mapping[str, int]
"""OpenFlow numbers of the interfaces of the bridge."""


@dataclass(frozen=True, slots=True)
class View:
    """What a host knows of the tenants' ports."""

    attachments: Mapping[Key, Attachment]
    taps: Names
    numbers: Numbers
    coming: Sequence[Coming] = ()
    leaving: Mapping[Key, Leaving] | None = None


def treat(view: View) -> tuple[Port, ...]:
    """All ports as this host treats them now, sorted."""
    new_taps = {key: name for coming in view.coming for key, name in coming.taps.items()}
    leaving = view.leaving or {}
    return tuple(
        _treat(
            attachment,
            _tap(view.taps.get(key), view.numbers),
            _tap(new_taps.get(key), view.numbers),
            leaving.get(key),
        )
        for key, attachment in sorted(view.attachments.items())
    )


def _treat(attachment: Attachment, tap: Tap | None, new_tap: Tap | None, leaving: Leaving | None) -> Port:
    port = Port(
        mac=attachment.key.mac,
        tunnel=attachment.key.tunnel,
        addresses=attachment.addresses,
        any_source=attachment.any_source,
        senders=_senders(tap, new_tap),
        arriving=attachment.arriving,
    )
    is_here = attachment.location == HERE
    match leaving:
        case Leaving(destination=""):
            return replace(port, place=new_tap, from_tunnels=new_tap, groups=new_tap)
        case Leaving(destination=destination) if is_here:
            there = Tunnel(destination)
            return replace(port, place=there, from_tunnels=there, groups=there)
        case Leaving(destination=destination):
            return replace(port, place=Tunnel(attachment.location), from_tunnels=Tunnel(destination))
    if is_here:
        return replace(port, place=tap, from_tunnels=tap, groups=tap)
    return replace(port, place=Tunnel(attachment.location), from_tunnels=new_tap, marked=new_tap)


def _senders(*taps: Tap | None) -> tuple[int, ...]:
    return tuple(sorted({tap.ofport for tap in taps if tap is not None}))


def _tap(name: str | None, numbers: Numbers) -> Tap | None:
    number = numbers.get(name) if name else None
    return None if number is None else Tap(number)


def conflicting(attachments: Iterable[Attachment]) -> str:
    """Why these can't be the ports of one fabric; empty when they can."""
    seen: dict[Key, Attachment] = {}
    holders: dict[tuple[int, str], Attachment] = {}
    for each in attachments:
        if (other := seen.setdefault(each.key, each)) is not each:
            return f"{each.name} and {other.name} both have MAC {each.key.mac} in network {each.key.tunnel}"
        for address in each.addresses:
            if (other := holders.setdefault((each.key.tunnel, address), each)) is not each:
                return f"{each.name} and {other.name} both have address {address} in network {each.key.tunnel}"
    return ""
