"""The members of the lab's etcd, each a node of its own."""

from dataclasses import dataclass

from handoff_lab.daemon import Daemon
from handoff_lab.fabric import MANAGEMENT_NET, Fabric
from handoff_lab.host import hosts_file
from handoff_lab.node import Node
from handoff_lab.state import Lab

CLIENT_PORT = 2379
PEER_PORT = 2380
# Twice etcd's own: on a machine of two cores with guests on them, a healthy member may well be late.
HEARTBEAT_MS = 200
ELECTION_MS = 2000


@dataclass(frozen=True, slots=True)
class EtcdMember:
    """Member etcd`index` of `members`."""

    lab: Lab
    index: int
    members: int

    @property
    def name(self) -> str:
        """etcd1 to etcd3."""
        return f"etcd{self.index}"

    @property
    def address(self) -> str:
        """Its address on the management network."""
        return etcd_address(self.index)

    @property
    def node(self) -> Node:
        """Its namespaces."""
        return Node(self.lab, self.name)

    def daemons(self) -> dict[str, Daemon]:
        """Just etcd."""
        cluster = ",".join(f"etcd{n}=http://{etcd_address(n)}:{PEER_PORT}" for n in range(1, self.members + 1))
        own_client, own_peer = f"http://{self.address}:{CLIENT_PORT}", f"http://{self.address}:{PEER_PORT}"
        options = {
            "name": self.name,
            "data-dir": str(self.node.directory / "data"),
            "listen-client-urls": f"{own_client},http://127.0.0.1:{CLIENT_PORT}",
            "advertise-client-urls": own_client,
            "listen-peer-urls": own_peer,
            "initial-advertise-peer-urls": own_peer,
            "initial-cluster": cluster,
            "initial-cluster-token": "handoff-lab",
            "heartbeat-interval": str(HEARTBEAT_MS),
            "election-timeout": str(ELECTION_MS),
            "auto-compaction-mode": "periodic",
            "auto-compaction-retention": "1h",
            "log-outputs": "stderr",
            "logger": "zap",
        }
        arguments = ("etcd", *(f"--{name}={value}" for name, value in options.items()))
        return {"etcd": Daemon(self.node, "etcd", arguments)}

    def boot(self) -> None:
        """Starts the node, unless it runs."""
        own = self.node.directory
        for part in ("etc", "run", "log"):
            (own / part).mkdir(parents=True, exist_ok=True)
        (own / "etc/hosts").write_text(hosts_file())
        self.node.start([(own / "etc/hosts", "/etc/hosts")])

    def connect(self, fabric: Fabric, cables: frozenset[str]) -> None:
        """Plugs the node in where it is not."""
        plug_management(self.node, self.address, fabric, cables)


def plug_management(node: Node, address: str, fabric: Fabric, cables: frozenset[str]) -> None:
    """Gives a node without an overlay its management interface, unless it has one."""
    if fabric.plug(node, node.require_pid(), False, cables):
        node.run(
            ["sh", "-e"],
            stdin=f"""
sysctl -qw net.ipv6.conf.all.disable_ipv6=1
ip addr replace {address}/24 dev mgmt0
ip link set mgmt0 up
""",
        )


def etcd_address(index: int) -> str:
    """The address of a member on the management network."""
    return f"{MANAGEMENT_NET}.{110 + index}"
