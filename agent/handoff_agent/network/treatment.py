"""How a host treats a tenant's port: where it is by the record, and what a handoff makes of that here. Pure.

    recorded at  handoff here        may send     frames of ports  out of tunnels  group frames
    here         none                tap          tap              tap             tap
    here         leaves, paused      tap          D                relayed to D    marked copies to D
    here         other slot, before  both taps    tap              tap             tap
    here         other slot, paused  both taps    new tap          new tap         new tap
    S            comes               new tap      S                new tap         marked copies to new tap
    D            left                tap          D                relayed to D    -
    elsewhere    none                -            tunnel           -               -

The last row but one carries what late senders send until the held copy is destroyed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from handoff_agent.network.pipeline import Port, Tap, Tunnel

HERE: Final = ""
"""The tunnel endpoint of this host itself."""


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
    """Tunnel endpoint of the host that it is on."""
    arriving: str = HERE
    """Tunnel endpoint of another host that it is on its way to."""
    domain_uuid: str = ""
    """The guest; empty for a port that is none."""
    name: str = ""
    """Of the guest; of its interface on the bridge when it is none."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What this host knows of one port beside its record. Taps are those that the bridge has."""

    tap: Tap | None = None
    new_tap: Tap | None = None
    """Of a guest that comes, to this host or to its other slot."""
    leaves_for: str | None = None
    """The guest is paused here, or was: tunnel endpoint of its destination, HERE for the other slot."""


NOTHING_KNOWN: Final = Situation()


def treat(attachment: Attachment, situation: Situation) -> Port:
    """The port as this host treats it now."""
    tap, new_tap, leaves_for = situation.tap, situation.new_tap, situation.leaves_for
    is_here = attachment.location == HERE
    senders = {each.ofport for each in (tap, new_tap) if each is not None}
    port = Port(
        mac=attachment.key.mac,
        tunnel=attachment.key.tunnel,
        addresses=attachment.addresses,
        any_source=attachment.any_source,
        senders=tuple(sorted(senders)),
        arriving=attachment.arriving,
    )
    if leaves_for == HERE or (is_here and leaves_for is None):
        to = (new_tap or tap) if leaves_for == HERE else (tap or new_tap)
        return replace(port, place=to, from_tunnels=to, groups=to)
    if leaves_for is not None:
        there = Tunnel(leaves_for)
        if is_here:
            return replace(port, place=there, from_tunnels=there, groups=there)
        return replace(port, place=Tunnel(attachment.location), from_tunnels=there)
    if new_tap is None:
        return replace(port, place=Tunnel(attachment.location), senders=())
    return replace(port, place=Tunnel(attachment.location), from_tunnels=new_tap, marked=new_tap)


def names(attachment: Attachment, candidates: Sequence[str], bound: str, *, comes: bool) -> tuple[str, str]:
    """Which of the guest's interfaces on this bridge is its tap, and which its new one; "" for neither.

    In an upgrade the guest has two with the same MAC: the one that was there before is the old one. `candidates`: the
    interfaces that were plugged in for this MAC of the guest; `bound`: the tap as known so far.
    """
    if not attachment.domain_uuid:
        return (attachment.name if attachment.location == HERE else ""), ""
    tap = bound if bound in candidates else ""
    other = next((name for name in reversed(candidates) if name != tap), "")
    if comes:
        return tap, other
    # A tap of a guest that is elsewhere is of one that comes, of which we have not been told yet.
    return tap or (other if attachment.location == HERE else ""), ""
