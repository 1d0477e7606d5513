"""The gateway: a machine on the overlay that is no hypervisor and has no agent.

It has an interface in each network, by VXLAN in its kernel. Where a guest is, it learns from the guest's own frames,
as a router at the edge of a site does. What it sees of a move is what the world outside sees.
"""

from dataclasses import dataclass

from handoff_lab.daemon import Daemon
from handoff_lab.fabric import OVERLAY_MTU, TUNNEL_NET, Fabric
from handoff_lab.host import hosts_file
from handoff_lab.networks import GATEWAY_NUMBER, MTU, NETWORKS, Network
from handoff_lab.node import Node
from handoff_lab.state import Lab, LabConfig

NAME = "gw"
TUNNEL_ADDRESS = f"{TUNNEL_NET}.{GATEWAY_NUMBER}"
_VXLAN_PORT = 4789


@dataclass(frozen=True, slots=True)
class Gateway:
    """There is one."""

    lab: Lab

    @property
    def name(self) -> str:
        """Its name as a node."""
        return NAME

    @property
    def node(self) -> Node:
        """Its namespaces."""
        return Node(self.lab, NAME)

    def daemons(self) -> dict[str, Daemon]:
        """None: all of it is in the kernel."""
        return {}

    def boot(self) -> None:
        """Starts the node, unless it runs."""
        own = self.node.directory
        (own / "etc").mkdir(parents=True, exist_ok=True)
        (own / "etc/hosts").write_text(hosts_file())
        self.node.start([(own / "etc/hosts", "/etc/hosts")])

    def connect(self, fabric: Fabric, cables: frozenset[str], config: LabConfig) -> None:
        """Plugs it in where it is not, and tells it of every host."""
        commands = ""
        if fabric.plug(self.node, self.node.require_pid(), overlay=True, existing=cables, management=False):
            commands = f"""
sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.rp_filter=0
sysctl -qw net.ipv4.conf.default.rp_filter=0
ip addr replace {TUNNEL_ADDRESS}/24 dev ovl0
ip link set ovl0 mtu {OVERLAY_MTU} up
{"".join(map(_interface, NETWORKS))}"""
        for network in NETWORKS:
            for number in range(1, config.hosts + 1):
                # To whomever it does not know it sends to all; a host drops what is for none of its guests.
                entry = f"00:00:00:00:00:00 dev {network.interface} dst {TUNNEL_NET}.{number}"
                commands += f"bridge fdb append {entry} 2>/dev/null || :\n"
        self.node.run(["sh", "-e"], stdin=commands)


def _interface(network: Network) -> str:
    name = network.interface
    # Without offloads: Open vSwitch in user space reads what is in the frame.
    return f"""\
ip link add {name} mtu {MTU} address {network.own_mac(GATEWAY_NUMBER)} type vxlan id {network.tunnel} \
dstport {_VXLAN_PORT} local {TUNNEL_ADDRESS} dev ovl0
ethtool -K {name} tx off tso off gso off gro off >/dev/null
ip addr add {network.address(GATEWAY_NUMBER)}/24 dev {name} metric {network.metric}
ip link set {name} up
"""
