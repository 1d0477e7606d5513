"""The guests' networks, and what of the lab is in each of them beside guests.

`tenant` is the site's own: its switches learn who is where. `red` and `blue` are tenants whose flows the agents keep;
their addresses and MACs are the same, so that what leaks from one to the other is seen.

In each network, every host has an interface to look at it from, and the gateway has one: a machine on the overlay
without an agent, whom nobody tells where a guest is.
"""

from dataclasses import dataclass
from typing import Final

from handoff_lab.errors import LabError

NO_NETWORK: Final = "none"
MTU: Final = 1400
"""VXLAN takes 50 of a link of 1500, and copies for a guest that moves 4 more."""
GATEWAY_NUMBER: Final = 254
METADATA: Final = "https://handoff.example/network/1"


@dataclass(frozen=True, slots=True)
class Network:
    """A network of guests. Numbers of ports are those of their addresses: 10 to 199 guests, 200 + N hosts, 254 the
    gateway.
    """

    name: str
    managed: bool
    tunnel: int
    """VXLAN id."""
    prefix: str
    """Of its addresses, a /24."""
    interface: str
    """What hosts and the gateway look at it from."""
    metric: int
    """Of two networks with the same addresses, a program that does not name an interface gets the one with less."""

    def address(self, number: int) -> str:
        """The IPv4 address of a port."""
        return f"{self.prefix}.{number}"

    def guest_mac(self, number: int) -> str:
        """Of a guest's interface."""
        return f"52:54:00:{self.prefix.split('.')[1]}:00:{number:02x}"

    def own_mac(self, number: int) -> str:
        """Of an interface of the lab's own."""
        return f"02:00:00:{self.prefix.split('.')[1]}:00:{number:02x}"

    def metadata(self, mac: str, address: str) -> str:
        """What a guest's definition says of its port, for the agents; nothing where they manage no flows."""
        if not self.managed:
            return ""
        return f"""
  <metadata>
    <handoff:network xmlns:handoff="{METADATA}">
      <handoff:port mac="{mac}" tunnel="{self.tunnel}" ip="{address}"/>
    </handoff:network>
  </metadata>"""


TENANT: Final = Network("tenant", False, 100, "10.30.0", "probe0", 0)
RED: Final = Network("red", True, 1001, "10.40.0", "red0", 10)
BLUE: Final = Network("blue", True, 1002, "10.40.0", "blue0", 20)
NETWORKS: Final = (TENANT, RED, BLUE)
MANAGED: Final = tuple(network for network in NETWORKS if network.managed)
NAMES: Final = (*(network.name for network in NETWORKS), NO_NETWORK)


def network_named(name: str) -> Network | None:
    """None for `none`. Raises LabError for a network that does not exist."""
    if name == NO_NETWORK:
        return None
    found = next((network for network in NETWORKS if network.name == name), None)
    if found is None:
        raise LabError(f"there is no network {name}: there are {', '.join(NAMES)}")
    return found
