"""The lab's controllers, each a node of its own."""

from dataclasses import dataclass

from handoff_lab import gateway
from handoff_lab.daemon import Daemon
from handoff_lab.etcd import CLIENT_PORT, etcd_address, plug_management
from handoff_lab.fabric import MANAGEMENT_NET, Fabric
from handoff_lab.host import AGENT_PORT, HOSTS_FROM, host_name, hosts_file, program
from handoff_lab.networks import GATEWAY_NUMBER, MANAGED, Network
from handoff_lab.node import Node
from handoff_lab.state import Lab, LabConfig
from handoff_lab.storage import Storage

CONTROLLER_PORT = 7700


@dataclass(frozen=True, slots=True)
class Controller:
    """Controller ctl`index`."""

    lab: Lab
    index: int

    @property
    def name(self) -> str:
        """ctl1 and up."""
        return f"ctl{self.index}"

    @property
    def address(self) -> str:
        """Its address on the management network."""
        return f"{MANAGEMENT_NET}.{100 + self.index}"

    @property
    def node(self) -> Node:
        """Its namespaces."""
        return Node(self.lab, self.name)

    def daemons(self) -> dict[str, Daemon]:
        """Just the controller."""
        arguments = (str(program("handoff-controller")), "--config", "/etc/handoff/controller.toml")
        return {"controller": Daemon(self.node, "controller", arguments, self.lab.controller_socket(self.name))}

    def write_files(self, config: LabConfig) -> bool:
        """Writes its configuration; True when that has changed."""
        own = self.node.directory
        for part in ("etc/handoff", "run", "log"):
            (own / part).mkdir(parents=True, exist_ok=True)
        (own / "etc/hosts").write_text(hosts_file())
        path, wanted = own / "etc/handoff/controller.toml", self._controller_toml(config)
        if path.exists() and path.read_text() == wanted:
            return False
        path.write_text(wanted)
        return True

    def _controller_toml(self, config: LabConfig) -> str:
        members = ", ".join(f'"{etcd_address(n)}:{CLIENT_PORT}"' for n in range(1, config.etcd + 1))
        hosts = "\n".join(f'{host_name(n)} = "{MANAGEMENT_NET}.{n}:{AGENT_PORT}"' for n in range(1, config.hosts + 1))
        own = f"{self.address}:{CONTROLLER_PORT}"
        static_ports = "\n".join(_static_ports(network, config) for network in MANAGED)
        return f"""\
name = "{self.name}"
listen = ["{own}", "unix:{self.lab.controller_socket(self.name)}"]
advertise = "{own}"

[etcd]
endpoints = [{members}]

[hosts]
{hosts}

[[volumes]]
protocol = "nbd"
service = "{Storage(self.lab).service}"

{static_ports}"""

    def boot(self) -> None:
        """Starts the node, unless it runs."""
        own = self.node.directory
        self.node.start([(own / "etc/hosts", "/etc/hosts"), (own / "etc/handoff", "/etc/handoff")])

    def connect(self, fabric: Fabric, cables: frozenset[str]) -> None:
        """Plugs the node in where it is not."""
        plug_management(self.node, self.address, fabric, cables)


def _static_ports(network: Network, config: LabConfig) -> str:
    """What of the lab is in a tenant's network beside guests."""

    def port(number: int, place: str) -> str:
        mac, address = network.own_mac(number), network.address(number)
        return f'[[static_ports]]\nmac = "{mac}"\ntunnel = {network.tunnel}\nips = ["{address}"]\n{place}\n'

    hosts = (
        port(HOSTS_FROM + n, f'host = "{host_name(n)}"\ninterface = "{network.interface}"')
        for n in range(1, config.hosts + 1)
    )
    return "\n".join([*hosts, port(GATEWAY_NUMBER, f'vtep = "{gateway.TUNNEL_ADDRESS}"')])
