"""The network between nodes: three bridges in a namespace of their own, and cables to each node.

Management is 10.10.0.0/24. The overlay link carries migration streams, 10.20.0.0/24, and VXLAN, 10.21.0.0/24; its rate
can be set. Storage is 10.50.0.0/24.
"""

import hashlib
import json
import re
from dataclasses import dataclass

from handoff_lab.errors import LabError
from handoff_lab.node import Node
from handoff_lab.state import Lab

MANAGEMENT_NET = "10.10.0"
OVERLAY_NET = "10.20.0"
TUNNEL_NET = "10.21.0"
STORAGE_NET = "10.50.0"
OVERLAY_MTU = 1600
UNLIMITED = "none"

_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]?)bit", re.IGNORECASE)
_RATE_FACTOR = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
# What the link may send at once: 10 ms of its rate, but never less than a few frames.
_BURST_S = 0.01
_LEAST_BURST_BYTES = 16_000
_QUEUE_MS = 100


def rate_bits_per_s(rate: str) -> int:
    """Reads "1gbit", "200mbit" and the like. Raises LabError for anything else."""
    match = _RATE.fullmatch(rate.strip())
    if match is None or float(match[1]) <= 0:
        raise LabError(f"{rate!r} is not a rate: write it like 1gbit or 200mbit, or `{UNLIMITED}`")
    return int(float(match[1]) * _RATE_FACTOR[match[2].lower()])


@dataclass(frozen=True, slots=True)
class Link:
    """A host's two cables: whether each is up, and the overlay's rate in tc's notation, None when unlimited."""

    management_up: bool
    overlay_up: bool
    rate: str | None


@dataclass(frozen=True, slots=True)
class Fabric:
    """The bridges and cables. Interfaces here are called m-NODE, o-NODE and s-NODE."""

    lab: Lab

    @property
    def node(self) -> Node:
        """The namespace that holds the bridges."""
        return Node(self.lab, "fabric")

    def start(self) -> None:
        """Makes the bridges unless they exist."""
        self.node.start()
        existing = self._interfaces()
        commands = []
        for bridge, mtu in (("mgmt", 1500), ("overlay", OVERLAY_MTU), ("storage", 1500)):
            if bridge not in existing:
                commands += [f"link add {bridge} type bridge", f"link set {bridge} mtu {mtu} up"]
        self._ip(commands)

    def plug(self, node: Node, pid: int, overlay: bool, existing: frozenset[str], *, management: bool = True) -> bool:
        """Connects a node where a cable is missing: mgmt0 and ovl0 there, as asked for. True when one was."""
        commands = []
        if management and f"m-{node.name}" not in existing:
            commands += [
                f"link add m-{node.name} type veth peer name mgmt0 address {_mac(node, 'mgmt0')} netns {pid}",
                f"link set m-{node.name} master mgmt up",
            ]
        if overlay and f"o-{node.name}" not in existing:
            commands += [
                f"link add o-{node.name} mtu {OVERLAY_MTU} type veth peer name ovl0 mtu {OVERLAY_MTU}"
                f" address {_mac(node, 'ovl0')} netns {pid}",
                f"link set o-{node.name} master overlay up",
            ]
        self._ip(commands)
        return bool(commands)

    def plug_storage(self, node: Node, pid: int, existing: frozenset[str]) -> bool:
        """Connects a node to the storage network, unless it is: sto0 there. True when it was not."""
        cable = f"s-{node.name}"
        if cable in existing:
            return False
        peer = f"name sto0 address {_mac(node, 'sto0')} netns {pid}"
        self._ip([f"link add {cable} type veth peer {peer}", f"link set {cable} master storage up"])
        return True

    def cables(self) -> frozenset[str]:
        """The names of the interfaces that exist here."""
        return frozenset(self._interfaces())

    def set_up(self, host: str, up: bool, management: bool, overlay: bool) -> None:
        """Cuts or mends a host's cables."""
        names = [f"m-{host}"] * management + [f"o-{host}"] * overlay
        self._ip([f"link set {name} {'up' if up else 'down'}" for name in names])

    def keep_apart(self, first: str, second: str, *, apart: bool) -> None:
        """Cuts or mends the overlay between two hosts; all others still reach both."""
        flag = "on" if apart else "off"
        self._ip([f"link set o-{name} type bridge_slave isolated {flag}" for name in (first, second)])

    def set_rate(self, host: Node, rate: str) -> None:
        """Limits a host's overlay link, both ways, or lifts the limit (`none`)."""
        for node, interface in ((self.node, f"o-{host.name}"), (host, "ovl0")):
            if rate == UNLIMITED:
                node.run(["tc", "qdisc", "del", "dev", interface, "root"], check=False)
                continue
            bits = rate_bits_per_s(rate)
            burst = max(int(bits / 8 * _BURST_S), _LEAST_BURST_BYTES)
            limit = f"rate {bits}bit burst {burst} latency {_QUEUE_MS}ms"
            node.run(["tc", "qdisc", "replace", "dev", interface, "root", "tbf", *limit.split()])

    def links(self) -> dict[str, Link]:
        """The state of each host's cables; empty when the fabric is down."""
        if self.node.pid() is None:
            return {}
        interfaces = self._interfaces()
        rates = self.lab.require_config().rates
        return {
            name.removeprefix("o-"): Link(
                management_up=interfaces.get(f"m-{name.removeprefix('o-')}", True),
                overlay_up=up,
                rate=rates.get(name.removeprefix("o-")),
            )
            for name, up in interfaces.items()
            if name.startswith("o-")
        }

    def _interfaces(self) -> dict[str, bool]:
        """Name and administrative state of each interface here."""
        listed = json.loads(self.node.run(["ip", "-j", "link"]).stdout)
        return {entry["ifname"]: "UP" in entry["flags"] for entry in listed}

    def _ip(self, commands: list[str]) -> None:
        # From outside of the fabric's pid namespace, so that `netns PID` means a pid as we see it.
        if commands:
            self.node.run_in_network(["ip", "-batch", "-"], stdin="\n".join(commands))


def _mac(node: Node, interface: str) -> str:
    """As a machine's own: the same after its power was off, so that its peers find it again at once."""
    digest = hashlib.sha256(f"{node.name}/{interface}".encode()).digest()[:5]
    return ":".join(f"{byte:02x}" for byte in (0x02, *digest))
