"""`handoff network`."""

import json

from conftest import Handoff
from fake_controller import FakeController, Fleet

from handoff.agent.v1.flow_pb2 import GetNetworkResponse, NetworkPort, PortHandoff, PortView
from handoff_cli.exits import Exit


def a_network() -> GetNetworkResponse:
    web = NetworkPort(
        mac="52:54:00:30:00:0a",
        tunnel=1001,
        ips=["10.30.0.10"],
        tunnel_address="10.21.0.1",
        name="web",
        domain_uuid="u",
    )
    view = PortView(
        port=web, interface="vnet3", ofport=7, handoff=PortHandoff.PORT_HANDOFF_COMING, frames_go_to="10.21.0.1"
    )
    return GetNetworkResponse(
        bridge="br-int",
        tunnel_address="10.21.0.2",
        connected=True,
        applied=True,
        term=3,
        generation=9,
        flows=24,
        ports=[view],
    )


async def test_ports_and_where_their_frames_go(handoff: Handoff, controller: FakeController, fleet: Fleet) -> None:
    fleet.networks["h2"] = a_network()
    ended = await handoff("network", "h2", "--controller", controller.address)
    assert ended.status == Exit.OK
    assert "h2: bridge br-int, tunnels at 10.21.0.2, 24 flows" in ended.out
    assert "told in term 3, generation 9" in ended.out
    line = next(line for line in ended.out.splitlines() if "web" in line)
    assert line.split() == [
        *("1001", "web", "52:54:00:30:00:0a", "10.30.0.10", "vnet3", "(7)", "coming", "10.21.0.1"),
    ]
    ended = await handoff("network", "h2", "-o", "json", "--controller", controller.address)
    assert json.loads(ended.out)["ports"][0]["interface"] == "vnet3"


async def test_what_is_wrong_with_it(handoff: Handoff, controller: FakeController, fleet: Fleet) -> None:
    fleet.networks["h2"] = GetNetworkResponse(
        bridge="br-int", tunnel_address="10.21.0.2", message="no bridge at /run/x"
    )
    ended = await handoff("network", "h2", "--controller", controller.address)
    assert "no bridge at /run/x" in ended.out
    assert "No leader has told it of any ports." in ended.out
    ended = await handoff("network", "h9", "--controller", controller.address)
    assert (ended.status, ended.err) == (Exit.REFUSED, "error: this agent manages no flows\n")
