"""The network of one host, from what it is told and what moves, to the flows of a real switch."""

import asyncio
import errno
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from dummy_switch import BRIDGE, DummySwitch
from structlog.testing import capture_logs

from handoff_agent.handoff import Handoff
from handoff_agent.ledger import Record
from handoff_agent.network import bridge, knowledge, network
from handoff_agent.network.companion import LeavingPorts
from handoff_agent.network.connection import OpenFlowConnection
from handoff_agent.network.flow import Flow, Output, SetField
from handoff_agent.network.knowledge import Moves, Store, Told
from handoff_agent.network.network import Network
from handoff_agent.network.newcomers import Definition
from handoff_agent.network.openflow import SeenFlow
from handoff_agent.network.pipeline import mark, scout
from handoff_agent.network.treatment import HERE, Attachment, Key
from handoff_agent.ovs_ports import OvsPorts
from handoff_agent.rules import HELD, READY, SOURCE
from handoff_agent.settings import NetworkSettings
from handoff_common.errors import DeadlineError, PreconditionError, UnavailableError

GUEST = Attachment(
    Key(1001, "52:54:00:30:00:0a"), ("10.30.0.10",), domain_uuid="0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0", name="web"
)
PEER = Attachment(
    Key(1001, "52:54:00:30:00:0b"), ("10.30.0.11",), location="10.21.0.2", domain_uuid="1" * 36, name="db"
)
ELSEWHERE = replace(GUEST, location="10.21.0.3")
WAIT_S = 10.0


async def no_tenants(_uuid: str) -> tuple[Attachment, ...]:
    """The definitions of guests that name no ports."""
    return ()


@asynccontextmanager
async def running(
    switch: DummySwitch, state: Path, definition: Definition = no_tenants, *, connected: bool = True
) -> AsyncIterator[Network]:
    """One life of an agent's network; it has not tried to connect yet if not `connected`."""
    settings = NetworkSettings(tunnel_address=IPv4Address("10.21.0.1"), openflow=switch.management)
    ports = OvsPorts(switch.database)
    network = Network(settings, switch.database, ports, Store(state), definition)
    await network.open()
    keeper = asyncio.create_task(network.run())
    try:
        if connected:
            await until(lambda: network.bridge.connected)
        yield network
    finally:
        keeper.cancel()
        await asyncio.wait({keeper})
        await network.close()
        ports.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - there is nothing to be told by
            await asyncio.sleep(0.01)


def told(*attachments: Attachment, generation: int = 1, term: int = 1) -> Told:
    return Told(term, generation, attachments)


def place_of(network: Network, attachment: Attachment = GUEST) -> str:
    [port] = [port for port in network.ports() if port.attachment.key == attachment.key]
    return port.goes_to


def deliveries(switch: DummySwitch, attachment: Attachment = GUEST) -> dict[str, str]:
    """What the switch does with frames to a MAC, by table."""
    found = {}
    for line in switch.flows():
        if match := re.search(rf"table=(\d+),.*dl_dst={attachment.key.mac} actions=(.*)", line):
            found[match[1]] = match[2]
    return found


def plug(switch: DummySwitch, name: str) -> None:
    switch.plug(name, GUEST.domain_uuid, GUEST.key.mac)


async def test_what_is_told_gets_into_the_switch_and_the_sites_own_stays(switch: DummySwitch, tmp_path: Path) -> None:
    plug(switch, "vnet0")
    switch.ofctl("add-flow", "table=0,priority=5,in_port=77,actions=drop")
    async with running(switch, tmp_path) as here:
        assert await here.tell(told(GUEST, PEER))
        number = here.bridge.numbers["vnet0"]
        assert deliveries(switch) == {"202": f"output:{number}", "203": f"output:{number}"}
        assert deliveries(switch, PEER)["202"].startswith("set_field:10.21.0.2->tun_dst,output:")
        assert await here.tell(told(generation=2))
        assert deliveries(switch) == {}
    assert any("priority=5,in_port=77 actions=drop" in line for line in switch.flows())


async def test_a_tap_that_comes_later_is_found(switch: DummySwitch, tmp_path: Path) -> None:
    async with running(switch, tmp_path) as here:
        await here.tell(told(GUEST, PEER))
        assert deliveries(switch) == {}
        plug(switch, "vnet0")
        await until(lambda: "202" in deliveries(switch))
        switch.unplug("vnet0")
        await until(lambda: deliveries(switch) == {})


async def test_a_new_life_of_the_agent_touches_no_flow_that_is_right(switch: DummySwitch, tmp_path: Path) -> None:
    plug(switch, "vnet0")
    async with running(switch, tmp_path) as here:
        await here.tell(told(GUEST, PEER))
        await here.leave(GUEST.domain_uuid, "10.21.0.2")
    before, flows = ages(switch), switch.flows()
    await asyncio.sleep(0.1)
    async with running(switch, tmp_path) as here:
        assert place_of(here) == "10.21.0.2"
        assert switch.flows() == flows
        assert all(age >= before[cookie] + 0.05 for cookie, age in ages(switch).items())
        await here.stay(GUEST.domain_uuid)
        assert place_of(here) == "vnet0"


async def test_a_pause_is_not_broken_off_because_the_agent_has_just_begun(switch: DummySwitch, tmp_path: Path) -> None:
    plug(switch, "vnet0")
    async with running(switch, tmp_path) as here:
        await here.tell(told(GUEST, PEER))
    async with running(switch, tmp_path, connected=False) as here:
        await here.leave(GUEST.domain_uuid, "10.21.0.2")
        assert place_of(here) == "10.21.0.2"
    switch.kill()
    async with running(switch, tmp_path, connected=False) as here:
        with pytest.raises(UnavailableError, match="no connection to the bridge"):
            await here.leave(GUEST.domain_uuid, "10.21.0.2")
    switch.start()


def ages(switch: DummySwitch) -> dict[str, float]:
    dumped = switch.ofctl("--stats", "dump-flows")
    return {cookie: float(age) for cookie, age in re.findall(r"cookie=(0x48ff\w+), duration=([\d.]+)s", dumped)}


async def test_a_switch_that_was_restarted_gets_its_flows_back(switch: DummySwitch, tmp_path: Path) -> None:
    plug(switch, "vnet0")
    async with running(switch, tmp_path) as here:
        await here.tell(told(GUEST, PEER))
        flows = len(switch.flows("cookie=0x48ff000000000000/0xffff000000000000"))
        switch.kill()
        await until(lambda: not here.bridge.connected)
        with pytest.raises(UnavailableError, match="no connection to the bridge"):
            await here.leave(GUEST.domain_uuid, "10.21.0.2")
        await here.stay(GUEST.domain_uuid)
        assert not await here.tell(told(GUEST, PEER, generation=2))
        switch.start()
        await until(lambda: here.bridge.connected and here.bridge.flows == flows)
        assert len(switch.flows("cookie=0x48ff000000000000/0xffff000000000000")) == flows


async def test_a_switch_that_restarts_in_the_pause_sends_on_again(switch: DummySwitch, tmp_path: Path) -> None:
    plug(switch, "vnet0")
    async with running(switch, tmp_path) as here:
        await here.tell(told(GUEST, PEER))
        await here.leave(GUEST.domain_uuid, "10.21.0.3")
        before = switch.flows()
        switch.kill()
        await until(lambda: not here.bridge.connected)
        switch.start()
        await until(lambda: here.bridge.connected)
        assert switch.flows() == before
        assert deliveries(switch)["203"] == "set_field:10.21.0.3->tun_dst,IN_PORT"


async def test_a_flow_that_somebody_deleted_comes_back(
    switch: DummySwitch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "CHECK_EVERY_S", 0.1)
    plug(switch, "vnet0")
    async with running(switch, tmp_path) as here:
        await here.tell(told(GUEST))
        before = switch.flows()
        switch.ofctl("del-flows", "table=202")
        switch.ofctl("add-flow", "table=202,cookie=0x48ff000000000001,priority=7,actions=drop")
        await until(lambda: switch.flows() == before)


@pytest.mark.parametrize("change", ["mod-flows", "add-flow"])
async def test_a_flow_that_somebody_changed_is_put_right(
    switch: DummySwitch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """It keeps our cookie, or loses it."""
    monkeypatch.setattr(bridge, "CHECK_EVERY_S", 0.1)
    plug(switch, "vnet0")
    async with running(switch, tmp_path) as here:
        await here.tell(told(GUEST))
        before = switch.flows()
        [ours] = [line for line in before if "table=203" in line and "dl_dst=52" in line]
        match = ours.partition(", ")[2].partition(" actions=")[0]
        switch.ofctl(change, f"{match},actions=NORMAL")
        assert switch.flows() != before
        await until(lambda: switch.flows() == before)


async def test_a_flow_that_is_changed_again_at_once_is_left_as_it_is(
    switch: DummySwitch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a switch that tells a flow in another way than it was told."""
    asked, applied = 0, 0
    tell, apply = OpenFlowConnection.flows, OpenFlowConnection.apply

    async def tells_in_another_way(connection: OpenFlowConnection) -> frozenset[SeenFlow]:
        nonlocal asked
        asked += 1
        return frozenset(SeenFlow(each.cookie, is_as_made=False) for each in await tell(connection))

    async def counts(
        connection: OpenFlowConnection, added: Sequence[Flow], deleted: Sequence[int], first: Sequence[int] = ()
    ) -> None:
        nonlocal applied
        applied += 1
        await apply(connection, added, deleted, first)

    monkeypatch.setattr(bridge, "CHECK_EVERY_S", 0.05)
    plug(switch, "vnet0")
    async with running(switch, tmp_path) as here:
        await here.tell(told(GUEST))
        monkeypatch.setattr(OpenFlowConnection, "flows", tells_in_another_way)
        monkeypatch.setattr(OpenFlowConnection, "apply", counts)
        with capture_logs() as logs:
            await until(lambda: asked >= 5)
        assert applied == 1
        [warned] = [line for line in logs if line["log_level"] == "warning"]
        assert (warned["flows"], "left as they are" in warned["event"]) == (here.bridge.flows, True)
        assert await here.tell(told(generation=2))
        assert deliveries(switch) == {}


async def test_flows_are_not_compared_while_a_guest_leaves_but_once_in_a_while(
    switch: DummySwitch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "CHECK_EVERY_S", 0.05)
    asked: list[float] = []
    tell = OpenFlowConnection.flows

    async def counts(connection: OpenFlowConnection) -> frozenset[SeenFlow]:
        asked.append(asyncio.get_running_loop().time())
        return await tell(connection)

    monkeypatch.setattr(OpenFlowConnection, "flows", counts)
    plug(switch, "vnet0")
    async with running(switch, tmp_path) as here:
        await here.tell(told(GUEST))
        await here.leave(GUEST.domain_uuid, "10.21.0.3")
        before = len(asked)
        await asyncio.sleep(0.5)
        assert len(asked) == before
        monkeypatch.setattr(bridge, "CHECK_AT_LEAST_EVERY_S", 0.3)
        await until(lambda: len(asked) >= before + 2)
        assert asked[-1] - asked[-2] >= 0.3
        await here.stay(GUEST.domain_uuid)
        monkeypatch.setattr(bridge, "CHECK_AT_LEAST_EVERY_S", 60.0)
        before = len(asked)
        await until(lambda: len(asked) >= before + 2)


async def test_a_guest_that_comes_is_served_from_its_taps_on(switch: DummySwitch, tmp_path: Path) -> None:
    async with running(switch, tmp_path) as here:
        await here.tell(told(ELSEWHERE, PEER))
        waiting = asyncio.create_task(here.expect(GUEST.domain_uuid, [GUEST]))
        plug(switch, "vnet0")
        await waiting
        number = here.bridge.numbers["vnet0"]
        assert deliveries(switch)["203"] == f"output:{number}"
        assert deliveries(switch)["202"].startswith("set_field:10.21.0.3->tun_dst")
        await here.settled(GUEST.domain_uuid)
        assert place_of(here) == "10.21.0.3", "only the leader makes it ours"
        await here.tell(told(GUEST, PEER, generation=2))
        assert deliveries(switch) == {"202": f"output:{number}", "203": f"output:{number}"}


async def test_the_ways_that_its_frames_will_take_are_tried_more_than_once(
    switch: DummySwitch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[SetField | Output, ...]] = []
    plug(switch, "vnet0")
    async with running(switch, tmp_path) as here:
        await until(lambda: "handoff0" in here.bridge.numbers)
        monkeypatch.setattr(here.bridge, "send", lambda actions, frame: tried.append(actions))
        gateway = replace(
            PEER, key=Key(1001, "02:00:00:30:00:fe"), addresses=(), location="10.21.0.254", domain_uuid=""
        )
        ways = {scout(1001, address, here.bridge.numbers["handoff0"]) for address in ("10.21.0.3", "10.21.0.254")}
        await here.tell(told(ELSEWHERE, gateway))
        assert tried == []
        await here.expect(GUEST.domain_uuid, [GUEST])
        assert ways < set(tried), "and its own tap"
        tried.clear()
        await here.tell(told(replace(ELSEWHERE, arriving="10.21.0.1"), gateway, generation=2))
        assert set(tried) == ways
        tried.clear()
        await here.tell(told(GUEST, gateway, generation=3))
        assert tried == []
        record = Record("m1", SOURCE, READY, domain_uuid=GUEST.domain_uuid, tunnel_address="10.21.0.3")
        leaving = LeavingPorts(here, cast(Handoff, SimpleNamespace(record=record)))
        await leaving.begin()
        await leaving.ordered()
        assert tried == 2 * [scout(1001, "10.21.0.3", here.bridge.numbers["handoff0"])]


async def test_a_guest_that_does_not_come_leaves_nothing(switch: DummySwitch, tmp_path: Path) -> None:
    plug(switch, "vnet0")
    async with running(switch, tmp_path) as here:
        before = switch.flows()
        await here.expect(GUEST.domain_uuid, [GUEST])
        assert "203" in deliveries(switch), "the leader need not have told of it"
        await here.not_coming(GUEST.domain_uuid)
        assert switch.flows() == before
        switch.unplug("vnet0")
    assert Store(tmp_path).load() == (Told(), Moves())


async def test_two_guests_that_come_at_once_are_told_apart_or_one_is_refused(
    switch: DummySwitch, tmp_path: Path
) -> None:
    alike = replace(PEER, key=Key(1001, "52:54:00:30:16:5e"))
    assert mark(alike.key.mac) == mark(GUEST.key.mac)
    plug(switch, "vnet0")
    switch.plug("vnet1", alike.domain_uuid, alike.key.mac)
    async with running(switch, tmp_path) as here:
        await here.tell(told(ELSEWHERE, alike))
        await here.expect(GUEST.domain_uuid, [GUEST])
        before = switch.flows()
        with pytest.raises(PreconditionError, match="db can't come while web does"):
            await here.expect(alike.domain_uuid, [alike])
        assert switch.flows() == before
        other_tenant = replace(alike, key=Key(1002, alike.key.mac))
        await here.expect(alike.domain_uuid, [other_tenant])
        await here.not_coming(alike.domain_uuid)
        await here.not_coming(GUEST.domain_uuid)
        await here.expect(alike.domain_uuid, [alike])


async def test_a_guest_whose_tap_does_not_appear_is_refused(
    switch: DummySwitch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "TAPS_TIMEOUT_S", 0.3)
    async with running(switch, tmp_path) as here:
        with pytest.raises(DeadlineError, match=f"guest web: its interface {GUEST.key.mac} has not appeared"):
            await here.expect(GUEST.domain_uuid, [GUEST])


async def test_a_guest_that_leaves_is_followed_and_comes_back(switch: DummySwitch, tmp_path: Path) -> None:
    plug(switch, "vnet0")
    async with running(switch, tmp_path) as here:
        await here.tell(told(GUEST, PEER))
        before = switch.flows()
        await here.redirect(GUEST.domain_uuid, "10.21.0.3")
        assert deliveries(switch)["203"] == "set_field:10.21.0.3->tun_dst,IN_PORT"
        assert deliveries(switch)["202"].startswith("set_field:10.21.0.3->tun_dst,output:")
        await here.stay(GUEST.domain_uuid)
        assert switch.flows() == before
        await here.leave(GUEST.domain_uuid, "10.21.0.3")
        await here.tell(told(ELSEWHERE, PEER, generation=2))
        assert deliveries(switch)["203"] == "set_field:10.21.0.3->tun_dst,IN_PORT", "for who has not heard of it yet"
        switch.unplug("vnet0")
        await here.gone(GUEST.domain_uuid)
        assert deliveries(switch) == {}, "its tenant has nothing here any more"


async def test_a_change_whose_end_was_not_seen_is_undone_all_the_same(
    switch: DummySwitch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug(switch, "vnet0")
    apply = OpenFlowConnection.apply

    async def apply_unseen(
        self: OpenFlowConnection, added: Sequence[Flow], deleted: Sequence[int], first: Sequence[int] = ()
    ) -> None:
        await apply(self, added, deleted, first)
        raise DeadlineError("nobody saw it")

    async with running(switch, tmp_path) as here:
        await here.tell(told(GUEST, PEER))
        before = switch.flows()
        with monkeypatch.context() as patched:
            patched.setattr(OpenFlowConnection, "apply", apply_unseen)
            with pytest.raises(DeadlineError):
                await here.redirect(GUEST.domain_uuid, "10.21.0.3")
        assert switch.flows() != before
        await here.stay(GUEST.domain_uuid)
        assert switch.flows() == before


async def test_an_upgrade_goes_from_tap_to_tap(switch: DummySwitch, tmp_path: Path) -> None:
    plug(switch, "vnet0")
    async with running(switch, tmp_path) as here:
        await here.tell(told(GUEST, PEER))
        plug(switch, "vnet1")
        await here.expect(GUEST.domain_uuid, [GUEST])
        assert place_of(here) == "vnet0"
        await here.redirect(GUEST.domain_uuid, HERE)
        assert place_of(here) == "vnet1"
        await here.stay(GUEST.domain_uuid)
        assert place_of(here) == "vnet0"
        await here.leave(GUEST.domain_uuid, HERE)
        await here.tell(told(GUEST, PEER, generation=2))
        assert place_of(here) == "vnet1"
        await here.settled(GUEST.domain_uuid)
        switch.unplug("vnet0")
        await here.gone(GUEST.domain_uuid)
        assert place_of(here) == "vnet1"
        assert here.ports()[0].interface == "vnet1"


async def test_frames_go_on_only_for_handoffs_that_there_are(switch: DummySwitch, tmp_path: Path) -> None:
    """An operator has removed the record of one, and runs the guest again by hand."""
    plug(switch, "vnet0")
    async with running(switch, tmp_path) as here:
        await here.tell(told(GUEST, PEER))
        await here.leave(GUEST.domain_uuid, "10.21.0.3")
    async with running(switch, tmp_path) as here:
        await here.only_these_leave({GUEST.domain_uuid, PEER.domain_uuid})
        assert place_of(here) == "10.21.0.3"
        await here.only_these_leave({PEER.domain_uuid})
        assert place_of(here) == "vnet0"
    assert Store(tmp_path).load()[1].leaving == {}


async def test_a_held_guests_frames_go_on_by_its_handoffs_record_alone(switch: DummySwitch, tmp_path: Path) -> None:
    """Its agent died on a full disk: nothing else is known of it."""
    record = Record("m1", SOURCE, HELD, domain_uuid=GUEST.domain_uuid, tunnel_address="10.21.0.3")
    plug(switch, "vnet0")
    async with running(switch, tmp_path) as here:
        await here.tell(told(GUEST, PEER))
        ports = LeavingPorts(here, cast(Handoff, SimpleNamespace(record=record)))
        await ports.held_again()
        assert place_of(here) == "10.21.0.3"
        await ports.back()
        assert place_of(here) == "vnet0"


async def test_a_full_disk_stops_no_traffic_and_is_made_up_for(
    switch: DummySwitch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    plug(switch, "vnet0")
    async with running(switch, tmp_path) as here:
        with monkeypatch.context() as patched:
            patched.setattr(knowledge, "replace_file", full)
            assert await here.tell(told(GUEST, PEER))
            assert place_of(here) == "vnet0"
            plug(switch, "vnet1")
            await until(lambda: "vnet1" in here.bridge.numbers)
            await here.look()
            assert here.bridge.connected
            await here.leave(GUEST.domain_uuid, "10.21.0.3")
            assert place_of(here) == "10.21.0.3"
            assert Store(tmp_path).load() == (Told(), Moves())
        moves = Moves(leaving={GUEST.domain_uuid: "10.21.0.3"}, taps={"1001/52:54:00:30:00:0a": "vnet0"})
        async with asyncio.timeout(5):  # the bridge's own look may have a last attempt at the full disk under way
            while Store(tmp_path).load() != (told(GUEST, PEER), moves):
                await here.look()


async def test_a_bug_leaves_nobody_without_a_bridge(
    switch: DummySwitch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "CHECK_EVERY_S", 0.1)

    async def fails(_self: Network) -> None:
        raise KeyError("a bug")

    plug(switch, "vnet0")
    async with running(switch, tmp_path) as here:
        await here.tell(told(GUEST))
        with monkeypatch.context() as patched:
            patched.setattr(Network, "look", fails)
            await until(lambda: "a bug" in here.bridge.message)
        await until(lambda: here.bridge.connected and not here.bridge.message)
        assert place_of(here) == "vnet0"


async def test_a_port_that_is_no_guests_is_found_by_its_name(switch: DummySwitch, tmp_path: Path) -> None:
    gateway = Attachment(Key(1001, "02:00:00:30:00:fe"), ("10.30.0.254",), any_source=True, name="gw0")
    switch.plug("gw0")
    async with running(switch, tmp_path) as here:
        await here.tell(told(gateway, PEER))
        assert place_of(here, gateway) == "gw0"
        assert deliveries(switch, gateway)["203"] == f"output:{here.bridge.numbers['gw0']}"


async def test_older_words_are_refused(switch: DummySwitch, tmp_path: Path) -> None:
    async with running(switch, tmp_path) as here:
        await here.tell(told(GUEST, generation=5, term=7))
        for stale in (told(generation=4, term=7), told(generation=9, term=6)):
            with pytest.raises(PreconditionError, match="generation 5 of term 7 has been told"):
                await here.tell(stale)
        await here.tell(told(generation=1, term=8))


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    moves = Moves({"a": (GUEST, PEER)}, {"b": "10.21.0.2", "c": HERE}, {"1001/52:54:00:30:00:0a": "vnet0"})
    store.save_told(told(GUEST, PEER))
    store.save_moves(moves)
    assert Store(tmp_path).load() == (told(GUEST, PEER), moves)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"attachments": [{}]}', '{"attachments": 5}'])
def test_what_cannot_be_read_is_nothing(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path)
    (tmp_path / "network" / "told.json").write_text(text)
    assert store.load() == (Told(), Moves())


def test_the_bridge_is_ours_by_name() -> None:
    settings = NetworkSettings(tunnel_address=IPv4Address("10.21.0.1"))
    assert settings.bridge == BRIDGE
    assert settings.management_socket() == Path("/run/openvswitch/br-int.mgmt")
