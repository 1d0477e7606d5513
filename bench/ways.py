"""The ways in which a guest's frames may follow it, for `make bench-switch`. Memory moves alike in all of them.

    redirect   ours: the source's bridge sends frames on right before the guest stops; the destination's tap keeps them
    duplicate  the others send to both hosts from before the move; the destination's bridge drops their frames until the
               new QEMU's first RARP, by learn(), and by that the others stop to send to the old host (what OVN calls
               activation by RARP)
    reactive   the usual one: whoever moves guests tells the bridges when the move is over
    learning   plain switches: they learn from the RARPs of the new QEMU

The gateway is nobody's to tell: in all of them it learns from what the guest sends.
"""

from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Final

from handoff_lab.fleet import Fleet
from handoff_lab.networks import GATEWAY_NUMBER
from handoff_lab.parallel import in_parallel
from handoff_lab.state import GuestRecord

HOSTS: Final = ("h1", "h2", "h3")
_TUNNELS_FROM: Final = 100
_TO_GUEST, _FROM_OTHERS, _SILENCE, _RARP, _LEARNT = 100, 110, 120, 130, 140
_RARP_TYPE: Final = "0x8035"


class Way(Enum):
    """See above."""

    REDIRECT = "redirect"
    DUPLICATE = "duplicate"
    REACTIVE = "reactive"
    LEARNING = "learning"


@dataclass(frozen=True, slots=True)
class Site:
    """The bridges of a site that drives the flows of one guest itself, on the lab's unmanaged network."""

    fleet: Fleet
    guest: GuestRecord

    def prepare(self, way: Way, source: str, destination: str) -> None:
        """Before the move."""
        match way:
            case Way.REDIRECT:
                return
            case Way.LEARNING:
                flows = dict.fromkeys(HOSTS, "")
            case Way.REACTIVE:
                # A port that nobody has told the bridge about can't send.
                flows = self._settled(source)
                flows[destination] += f"priority={_SILENCE},dl_src={self.guest.mac},actions=drop\n"
            case Way.DUPLICATE:
                flows = self._settled(source) | self._duplicating(source, destination)
        self._put(flows)

    def follow(self, way: Way, destination: str) -> None:
        """After the move."""
        if way in (Way.REACTIVE, Way.DUPLICATE):
            self._put(self._settled(destination))

    def _settled(self, home: str) -> dict[str, str]:
        """Everybody sends to one host, and it to the guest; what came out of a tunnel goes into none."""
        mac = self.guest.mac
        flows: dict[str, str] = {}
        for host in HOSTS:
            if host == home:
                flows[host] = f"priority={_TO_GUEST},dl_dst={mac},actions=output:{self._tap(host)}\n"
                continue
            flows[host] = f"priority={_TO_GUEST},dl_dst={mac},actions=output:{_tunnel(home)}\n"
            for tunnel in _tunnels(host):
                flows[host] += f"priority={_FROM_OTHERS},in_port={tunnel},dl_dst={mac},actions=drop\n"
        return flows

    def _duplicating(self, source: str, destination: str) -> dict[str, str]:
        mac = self.guest.mac
        rarp = f"dl_src={mac},dl_type={_RARP_TYPE}"
        learn = f"learn(table=0,priority={_LEARNT},NXM_OF_ETH_DST[]=NXM_OF_ETH_SRC[],output:NXM_OF_IN_PORT[]),normal"
        there = self._settled(source)[destination]
        there += f"priority={_RARP},{rarp},actions={learn}\n"
        for tunnel in _tunnels(destination):
            there += f"priority={_LEARNT},in_port={tunnel},{rarp},actions=normal\n"
        flows = {destination: there}
        for host in HOSTS:
            if host not in (source, destination):
                both = f"output:{_tunnel(source)},output:{_tunnel(destination)}"
                flows[host] = f"priority={_TO_GUEST},dl_dst={mac},actions={both}\n"
                for tunnel in _tunnels(host):
                    flows[host] += f"priority={_FROM_OTHERS},in_port={tunnel},dl_dst={mac},actions=drop\n"
                flows[host] += f"priority={_RARP},in_port={_tunnel(destination)},{rarp},actions={learn}\n"
        return flows

    def _tap(self, host: str) -> int:
        words = (
            "--bare",
            "--columns=ofport",
            "find",
            "Interface",
            f"external_ids:attached-mac={_quoted(self.guest.mac)}",
        )
        return int(self.fleet.node(host).run(["ovs-vsctl", *words]).stdout.split()[0])

    def _put(self, flows: dict[str, str]) -> None:
        """On all bridges at once, on each atomically."""
        in_parallel([partial(self._put_on, host, text) for host, text in flows.items()])

    def _put_on(self, host: str, flows: str) -> None:
        mac = self.guest.mac
        removed = f"delete dl_dst={mac}\ndelete dl_src={mac}\n"
        added = "".join(f"add {flow}\n" for flow in flows.splitlines())
        self.fleet.node(host).run(["ovs-ofctl", "--bundle", "add-flows", "br-int", "-"], stdin=removed + added)


def _tunnel(host: str) -> int:
    """The OpenFlow number, on any other host, of the tunnel to this one."""
    return _TUNNELS_FROM + int(host[1:])


def _tunnels(host: str) -> list[int]:
    """The tunnels of a host."""
    return [*(_tunnel(other) for other in HOSTS if other != host), _TUNNELS_FROM + GATEWAY_NUMBER]


def _quoted(text: str) -> str:
    return f'"{text}"'
