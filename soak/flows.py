"""What a move may leave in the switches: by the agents' word, and by the flows themselves.

home         frames for the guest go to its tap; none of it goes to a tunnel
elsewhere    they go to its home's tunnel endpoint; what comes out of a tunnel for it goes nowhere
lost         nobody is to be sent anything out of a tunnel
all          no handoff has a hand in any port; no flow is of a port that the switch does not have any more
"""

import asyncio
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import grpc.aio

from handoff.agent.v1.flow_pb2 import GetNetworkResponse, PortHandoff, PortView
from handoff_agent.network.pipeline import CLASSIFIER, FROM_PORTS, FROM_TUNNELS
from handoff_lab.errors import LabError
from handoff_lab.fabric import TUNNEL_NET
from handoff_lab.host import host_index
from soak.scene import Scene

OURS: Final = "cookie=0x48ff000000000000/0xffff000000000000"
_TABLE: Final = re.compile(r"\btable=(\d+)")
_IN_PORT: Final = re.compile(r"\bin_port=(\d+)")
_OUTPUT: Final = re.compile(r"\boutput:(\d+)|\bIN_PORT\b")


@dataclass(frozen=True, slots=True)
class Flow:
    """A flow as ovs-ofctl prints it, in parts."""

    table: int
    match: str
    actions: str

    @classmethod
    def parse(cls, line: str) -> "Flow":
        """Reads a line of dump-flows."""
        match, _, actions = line.partition(" actions=")
        table = _TABLE.search(match)
        return cls(int(table[1]) if table else 0, match.split()[-1], actions)

    @property
    def in_port(self) -> int | None:
        """The port that it is of."""
        found = _IN_PORT.search(self.match)
        return int(found[1]) if found else None

    @property
    def outputs(self) -> frozenset[int]:
        """The ports that it sends to; 0 for the one that the frame came by."""
        return frozenset(int(found[1] or 0) for found in _OUTPUT.finditer(self.actions))


async def left(scene: Scene, host: str, home: str | None) -> list[str]:
    """What a host's switch has of the guest, and should not have, when its home is `home`; None: it is nowhere."""
    node = scene.fleet.host(host).node
    try:
        view, dumped, numbers = await asyncio.gather(
            scene.agent(host).network(),
            asyncio.to_thread(node.run, ["ovs-ofctl", "-O", "OpenFlow14", "dump-flows", "br-int", OURS]),
            asyncio.to_thread(node.run, ["ovs-vsctl", "--bare", "--columns=ofport", "list", "Interface"]),
        )
    except (grpc.aio.AioRpcError, LabError) as error:
        return [f"its network can't be seen: {error}"]
    flows = [Flow.parse(line) for line in dumped.stdout.splitlines() if "cookie=" in line]
    ports = frozenset(int(number) for number in numbers.stdout.split())
    found = list(of_all(view, flows, ports))
    mine = [one for one in view.ports if one.port.domain_uuid == scene.guest.uuid]
    if not mine:
        return found
    place = "" if home is None else f"{TUNNEL_NET}.{host_index(home)}"
    return [*found, *of_guest(mine[0], flows, "here" if host == home else place)]


def of_all(view: GetNetworkResponse, flows: Sequence[Flow], ports: frozenset[int]) -> Iterator[str]:
    """What is wrong with a switch, whoever's ports it has; `ports`: the numbers of those. Pure."""
    if not view.applied:
        yield f"the switch has not what it should have: {view.message}"
    if view.flows != len(flows):
        yield f"the agent knows of {view.flows} flows, and there are {len(flows)}"
    for one in view.ports:
        if one.handoff != PortHandoff.PORT_HANDOFF_UNSPECIFIED:
            yield f"port {one.port.mac} of {one.port.name} is {PortHandoff.Name(one.handoff)}"
    stale = {flow.in_port for flow in flows if flow.in_port is not None} - ports
    if stale:
        yield f"flows of ports that are gone, {sorted(stale)}"


def of_guest(view: PortView, flows: Sequence[Flow], place: str) -> Iterator[str]:
    """What is wrong with one port and its flows. Pure.

    `place`: "here"; the tunnel endpoint of the host that has the guest; "" for one that is nowhere.
    """
    port, is_here = view.port, place == "here"
    if port.arriving_at:
        yield f"port {port.mac} of {port.name} is on its way to {port.arriving_at}"
    for_it = [flow for flow in flows if f"dl_dst={port.mac}" in flow.match and f"tun_id={port.tunnel:#x}" in flow.match]
    out_of_tunnels = [flow for flow in for_it if flow.table == FROM_TUNNELS]
    of_ports = [flow for flow in for_it if flow.table == FROM_PORTS]
    if not is_here:
        yield from (f"what comes for the guest goes on: {flow.actions}" for flow in out_of_tunnels)
        if view.ofport:
            yield f"its port {view.interface} is still there"
    if not place:
        return
    if is_here:
        yield from (
            f"the guest's frames go elsewhere: {flow.actions}"
            for flow in for_it
            if flow.outputs != {view.ofport} or "tun_dst" in flow.actions
        )
        if len(out_of_tunnels) != 1 or len(of_ports) != 1:
            yield "the guest is not reached here"
        own = [flow for flow in flows if flow.table == CLASSIFIER and flow.in_port == view.ofport]
        if not any("tun_id" in flow.actions for flow in own):
            yield "the guest's port can't send"
    elif view.frames_go_to != place:
        yield f"the guest's frames go to {view.frames_go_to}, not to {place}"
    elif not all(f"set_field:{place}->tun_dst" in flow.actions for flow in of_ports):
        yield f"the guest's frames do not go to {place}: {[flow.actions for flow in of_ports]}"
