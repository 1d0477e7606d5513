"""What a move leaves in switches and folders of disks is seen, and what belongs there is not taken for it."""

from collections.abc import Sequence

import pytest

from handoff.agent.v1.flow_pb2 import GetNetworkResponse, NetworkPort, PortHandoff, PortView
from soak.disks import differences
from soak.flows import Flow, of_all, of_guest

MAC = "52:54:00:40:00:0a"
HOME = "10.21.0.3"
HEAD = "cookie=0x48ff0ea7519394c2, duration=13.104s, "
CLASSIFIED = (
    f" {HEAD}table=0, n_packets=1, n_bytes=42, priority=64000,in_port=6 actions=set_field:0x3e9->tun_id,goto_table:200"
)
FROM_PORTS = f" {HEAD}table=202, n_packets=12, n_bytes=855, priority=200,tun_id=0x3e9,dl_dst={MAC} actions="
FROM_TUNNELS = f" {HEAD}table=203, n_packets=12, n_bytes=855, priority=200,tun_id=0x3e9,dl_dst={MAC} actions="
OTHER_TENANT = f" {HEAD}table=203, n_packets=0, n_bytes=0, priority=200,tun_id=0x3ea,dl_dst={MAC} actions=output:9"
TO_HOME = f"set_field:{HOME}->tun_dst,output:4"
AT_HOME = (CLASSIFIED, f"{FROM_PORTS}output:6", f"{FROM_TUNNELS}output:6", OTHER_TENANT)
ELSEWHERE = (f"{FROM_PORTS}{TO_HOME}", OTHER_TENANT)


def port(interface: str = "", ofport: int = 0, goes_to: str = HOME, arriving_at: str = "") -> PortView:
    recorded = NetworkPort(mac=MAC, tunnel=1001, name="guest-b", arriving_at=arriving_at)
    return PortView(port=recorded, interface=interface, ofport=ofport, frames_go_to=goes_to)


TAP = port("vnet7", 6, "vnet7")
REMOTE = port()


def found(view: PortView, lines: Sequence[str], place: str) -> str:
    return "; ".join(of_guest(view, [Flow.parse(line) for line in lines], place))


def test_a_line_is_read() -> None:
    flow = Flow.parse(f" {HEAD}table=203, n_packets=0, n_bytes=0, priority=200,in_port=4 actions=output:6,IN_PORT")
    assert (flow.table, flow.in_port, flow.outputs) == (203, 4, frozenset({6, 0}))
    assert Flow.parse(ELSEWHERE[0]).in_port is None


@pytest.mark.parametrize(
    ("view", "lines", "place"),
    [(TAP, AT_HOME, "here"), (REMOTE, ELSEWHERE, HOME), (REMOTE, (), ""), (REMOTE, ELSEWHERE, "")],
    ids=["home", "elsewhere", "lost", "lost, and its record names a host"],
)
def test_a_guest_that_has_settled_leaves_nothing(view: PortView, lines: Sequence[str], place: str) -> None:
    assert found(view, lines, place) == ""


@pytest.mark.parametrize(
    ("view", "lines", "place", "said"),
    [
        (REMOTE, (*ELSEWHERE, f"{FROM_TUNNELS}set_field:{HOME}->tun_dst,IN_PORT"), HOME, "goes on"),
        (REMOTE, (f"{FROM_PORTS}set_field:10.21.0.4->tun_dst,output:4",), HOME, "do not go to 10.21.0.3"),
        (port(goes_to="10.21.0.4"), ELSEWHERE, HOME, "go to 10.21.0.4"),
        (port("vnet7", 6), ELSEWHERE, HOME, "vnet7 is still there"),
        (REMOTE, (*ELSEWHERE, f"{FROM_TUNNELS}output:6"), "", "goes on"),
        (TAP, (*AT_HOME[:2], f"{FROM_TUNNELS}set_field:10.21.0.4->tun_dst,IN_PORT"), "here", "go elsewhere"),
        (TAP, (CLASSIFIED, f"{FROM_PORTS}{TO_HOME}", AT_HOME[2]), "here", "go elsewhere"),
        (TAP, AT_HOME[:2], "here", "not reached"),
        (TAP, AT_HOME[1:], "here", "can't send"),
        (port("vnet7", 6, "vnet7", arriving_at="10.21.0.4"), AT_HOME, "here", "on its way to 10.21.0.4"),
    ],
)
def test_what_a_move_leaves_in_a_switch_is_seen(view: PortView, lines: Sequence[str], place: str, said: str) -> None:
    assert said in found(view, lines, place)


def test_what_is_wrong_with_a_switch_is_seen() -> None:
    flows = [Flow.parse(line) for line in AT_HOME]
    good = GetNetworkResponse(applied=True, flows=len(flows), ports=[TAP])
    assert list(of_all(good, flows, frozenset({6}))) == []
    assert list(of_all(good, flows, frozenset())) == ["flows of ports that are gone, [6]"]
    assert list(of_all(good, flows[1:], frozenset())) == ["the agent knows of 4 flows, and there are 3"]
    leaving = PortView(port=TAP.port, handoff=PortHandoff.PORT_HANDOFF_LEAVING)
    bad = GetNetworkResponse(applied=False, message="no bridge", flows=0, ports=[leaving])
    assert list(of_all(bad, [], frozenset())) == [
        "the switch has not what it should have: no bridge",
        f"port {MAC} of guest-b is PORT_HANDOFF_LEAVING",
    ]


def test_images_that_are_too_many_or_missing_are_seen() -> None:
    image = "/srv/vms/guest-b-vdb.qcow2"
    overlay = f"{image}.20261124-163001-551d"
    assert differences({image}, {image}) == []
    assert differences({image, overlay}, {image}) == [f"image {overlay}"]
    assert differences({overlay}, {image}) == [f"image {overlay}", f"image {image} is missing"]
