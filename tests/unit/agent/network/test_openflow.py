"""What we send, as a real Open vSwitch understands it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from dummy_switch import DummySwitch
from hypothesis import HealthCheck, given, settings
from test_pipeline import HOSTS, Move, moves

from handoff_agent.network.bridge import differences
from handoff_agent.network.connection import OpenFlowConnection
from handoff_agent.network.flow import Field, Flow, Goto, Is, Output, SetField, mac_number
from handoff_agent.network.openflow import PortDescription, cookie
from handoff_agent.network.pipeline import FROM_PORTS, Tap, common_flows, scout, tenant_flows
from handoff_agent.network.treatment import Attachment, Key, Situation, treat
from handoff_common.errors import PreconditionError, UnavailableError

GUEST = Attachment(Key(1001, "52:54:00:30:00:0a"), ("10.30.0.10",))
OTHER = Attachment(Key(1001, "52:54:00:30:00:0b"), ("10.30.0.11",), location="10.21.0.2")
MOVING = Attachment(Key(1001, "52:54:00:30:00:0c"), ("10.30.0.12",))

# As ovs-ofctl prints them.
FROM_GUEST = "priority=200,{},in_port=10,vlan_tci=0x0000/0x1fff,dl_src=52:54:00:30:00:0a,{} actions=goto_table:201"
EXPECTED = {
    "priority=64000,in_port=10 actions=set_field:0x3e9->tun_id,goto_table:200",
    "priority=64000,tun_id=0x3e9,in_port=99 actions=goto_table:203",
    "priority=63999,in_port=99 actions=drop",
    f"table=200, {FROM_GUEST.format('ip', 'nw_src=10.30.0.10')}",
    f"table=200, {FROM_GUEST.format('arp', 'arp_spa=10.30.0.10,arp_sha=52:54:00:30:00:0a')}",
    f"table=200, {FROM_GUEST.format('rarp', 'arp_sha=52:54:00:30:00:0a')}",
    "table=202, priority=200,tun_id=0x3e9,dl_dst=52:54:00:30:00:0b actions=set_field:10.21.0.2->tun_dst,output:99",
    "table=203, priority=200,tun_id=0x3e9,dl_dst=52:54:00:30:00:0c actions=set_field:10.21.0.3->tun_dst,IN_PORT",
}


async def cookies(connection: OpenFlowConnection) -> set[int]:
    """Of our flows, all of which must be as we made them."""
    flows = await connection.flows()
    assert all(flow.is_as_made for flow in flows), "the switch tells them in another way than we do"
    return {flow.cookie for flow in flows}


@asynccontextmanager
async def connected(switch: DummySwitch, seen: list[tuple[bool, PortDescription]]) -> AsyncIterator[OpenFlowConnection]:
    connection = await OpenFlowConnection.open(switch.management, lambda present, port: seen.append((present, port)))
    reading = asyncio.create_task(connection.run())
    try:
        yield connection
    finally:
        reading.cancel()
        await asyncio.wait({reading})


def some_flows() -> frozenset[Flow]:
    situations = (Situation(Tap(10)), Situation(), Situation(Tap(12), leaves_for="10.21.0.3"))
    ports = [treat(each, situation) for each, situation in zip((GUEST, OTHER, MOVING), situations, strict=True)]
    return tenant_flows(ports, 99) | common_flows(99)


async def test_flows_are_what_they_say(switch: DummySwitch) -> None:
    flows = some_flows()
    async with connected(switch, []) as connection:
        await connection.apply(tuple(flows), ())
        assert await cookies(connection) == {cookie(flow) for flow in flows}
    lines = switch.flows("cookie=0x48ff000000000000/0xffff000000000000")
    assert len(lines) == len(flows)
    assert {line.partition(", ")[2] for line in lines} >= EXPECTED


@given(moves())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
async def test_every_flow_of_a_move_is_accepted(switch: DummySwitch, move: Move) -> None:
    async with connected(switch, []) as connection:
        there = await cookies(connection)
        for host in HOSTS:
            flows = {cookie(flow): flow for flow in move.fabric.flows(host)}
            added = [flow for number, flow in flows.items() if number not in there]
            await connection.apply(added, [number for number in there if number not in flows])
            there = await cookies(connection)
            assert there == set(flows)


async def test_a_refused_flow_changes_nothing(switch: DummySwitch) -> None:
    # A UDP port needs to be one of a UDP packet.
    wrong = Flow(200, 1, (Is(Field.UDP_SRC, 68),))
    async with connected(switch, []) as connection:
        await connection.apply(tuple(some_flows()), ())
        before = await cookies(connection)
        with pytest.raises(PreconditionError, match="refused 1 of"):
            await connection.apply((Flow(0, 1, (Is(Field.IN_PORT, 5),)), wrong), tuple(before))
        assert await cookies(connection) == before


async def test_the_sites_flows_are_not_ours(switch: DummySwitch) -> None:
    switch.ofctl("add-flow", "table=0,priority=5,in_port=7,actions=NORMAL")
    async with connected(switch, []) as connection:
        await connection.apply(tuple(some_flows()), ())
        await connection.apply((), tuple(await cookies(connection)))
        assert await cookies(connection) == set()
    assert any("priority=5,in_port=7 actions=NORMAL" in line for line in switch.flows())


async def test_another_action_for_the_same_match_takes_the_place_of_the_first(switch: DummySwitch) -> None:
    match = (Is(Field.IN_PORT, 5),)
    first, second = Flow(0, 9, match, (Output(6),)), Flow(0, 9, match, (SetField(Field.TUNNEL_ID, 1), Goto(200)))
    async with connected(switch, []) as connection:
        await connection.apply((first,), ())
        await connection.apply((second,), (cookie(first),))
        assert await cookies(connection) == {cookie(second)}


async def test_a_flow_that_somebody_has_changed_is_not_what_its_cookie_says(switch: DummySwitch) -> None:
    flows = tuple(some_flows())
    async with connected(switch, []) as connection:
        await connection.apply(flows, ())
        switch.ofctl("mod-flows", "table=202,tun_id=0x3e9,dl_dst=52:54:00:30:00:0b,actions=NORMAL")
        [changed] = [seen for seen in await connection.flows() if not seen.is_as_made]
        missing, surplus, altered = differences(await connection.flows(), flows)
        assert surplus == []
        assert [cookie(flow) for flow in missing] == altered == [changed.cookie]
        await connection.apply(missing, surplus, altered)
        assert await cookies(connection) == {cookie(flow) for flow in flows}


async def test_what_another_version_made_is_deleted_last(switch: DummySwitch) -> None:
    """Its flows are not what their cookies say to us: ours take their places first, and no frame is lost."""
    flow = Flow(0, 9, (Is(Field.IN_PORT, 5),), (Output(6),))
    async with connected(switch, []) as connection:
        switch.ofctl("add-flow", "cookie=0x48ff000000000001,table=0,priority=9,in_port=5,actions=output:6")
        [theirs] = await connection.flows()
        assert not theirs.is_as_made
        assert differences({theirs}, [flow]) == ([flow], [theirs.cookie], [])
        await connection.apply(*differences({theirs}, [flow]))
        assert await cookies(connection) == {cookie(flow)}


@pytest.mark.parametrize(
    "other",
    [
        "table=202,priority=200,tun_id=0x3e9,dl_dst=52:54:00:30:00:0b,actions=drop",
        "table=202,priority=201,tun_id=0x3e9,dl_dst=52:54:00:30:00:0b,actions=set_field:10.21.0.2->tun_dst,output:99",
        "table=202,priority=200,tun_id=0x3e9,dl_dst=52:54:00:30:00:0d,actions=set_field:10.21.0.2->tun_dst,output:99",
        "table=202,priority=200,idle_timeout=9,tun_id=0x3e9,dl_dst=52:54:00:30:00:0b,"
        "actions=set_field:10.21.0.2->tun_dst,output:99",
    ],
)
async def test_a_flow_that_somebody_else_made_with_a_cookie_of_ours_goes(switch: DummySwitch, other: str) -> None:
    """Whether it has taken the place of ours or is there beside it."""
    flows = tuple(some_flows())
    to_other = Is(Field.ETH_DST, mac_number(OTHER.key.mac))
    [ours] = [cookie(flow) for flow in flows if flow.table == FROM_PORTS and to_other in flow.match]
    async with connected(switch, []) as connection:
        await connection.apply(flows, ())
        switch.ofctl("add-flow", f"cookie={ours:#x},{other}")
        await connection.apply(*differences(await connection.flows(), flows))
        assert await cookies(connection) == {cookie(flow) for flow in flows}
    assert len(switch.flows("cookie=0x48ff000000000000/0xffff000000000000")) == len(flows)


async def test_ports_are_told_as_they_come_and_go(switch: DummySwitch) -> None:
    seen: list[tuple[bool, PortDescription]] = []
    async with connected(switch, seen) as connection:
        switch.plug("vnet0")
        [vnet0] = [port for port in await connection.ports() if port.name == "vnet0"]
        switch.unplug("vnet0")
        assert "vnet0" not in {port.name for port in await connection.ports()}
    assert (True, vnet0) in seen
    assert seen[-1] == (False, vnet0)


async def test_a_frame_of_our_own_is_sent(switch: DummySwitch) -> None:
    switch.plug("vnet0")
    async with connected(switch, []) as connection:
        [number] = [port.number for port in await connection.ports() if port.name == "vnet0"]
        connection.send(scout(1001, "10.21.0.2", number), bytes(60))
        await connection.ports()
    assert "tx pkts=1," in switch.ofctl("dump-ports", "vnet0")


async def test_without_a_switch_it_says_so(switch: DummySwitch) -> None:
    async with connected(switch, []) as connection:
        switch.kill()
        with pytest.raises(UnavailableError):
            while True:
                await cookies(connection)
    with pytest.raises(UnavailableError, match="no bridge at"):
        await OpenFlowConnection.open(switch.management, lambda present, port: None)
