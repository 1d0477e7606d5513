"""The tenants' networks of one host."""

from rich.console import Group, RenderableType
from rich.text import Text

from handoff.agent.v1.flow_pb2 import GetNetworkResponse, PortHandoff, PortView
from handoff_cli.render.parts import table

_HANDOFFS = {
    PortHandoff.PORT_HANDOFF_UNSPECIFIED: "–",
    PortHandoff.PORT_HANDOFF_COMING: "coming",
    PortHandoff.PORT_HANDOFF_LEAVING: "leaving",
}


def network_view(host: str, network: GetNetworkResponse) -> RenderableType:
    """A line about the bridge, then one for each port."""
    head = Text.assemble((host, "bold"), f": bridge {network.bridge}, tunnels at {network.tunnel_address}, ")
    if network.applied:
        head.append(f"{network.flows} flows")
    else:
        head.append(network.message or "not connected", "bold red")
    if not network.generation:
        return Group(head, Text("No leader has told it of any ports."))
    made = table(("TENANT", "PORT", "MAC", "ADDRESSES", "HERE", "HANDOFF", "FRAMES GO TO"), right=("TENANT",))
    for view in network.ports:
        made.add_row(*_cells(view))
    told = Text(f"told in term {network.term}, generation {network.generation}", "dim")
    return Group(head, told, Text(), made)


def _cells(view: PortView) -> list[str]:
    port = view.port
    return [
        str(port.tunnel),
        port.name,
        port.mac,
        ", ".join(port.ips) or "any",
        f"{view.interface} ({view.ofport})" if view.interface else "–",
        _HANDOFFS.get(view.handoff, "–"),
        view.frames_go_to,
    ]
