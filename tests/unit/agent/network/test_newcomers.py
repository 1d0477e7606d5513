"""A port of which nobody has told: what the switch does with it until its guest's definition is read, and after."""

import asyncio
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import libvirt
import pytest
from dummy_switch import DummySwitch
from test_host_network import ELSEWHERE, GUEST, PEER, ages, deliveries, plug, running, told, until

from handoff_agent.network import network, newcomers
from handoff_agent.network.metadata import NAMESPACE, NO_TUNNEL
from handoff_agent.network.newcomers import admitted, definition_of
from handoff_agent.network.treatment import Attachment, Key
from handoff_agent.slots import Hypervisor
from handoff_common.errors import DeadlineError, NotFoundError, UnavailableError

OTHER = replace(GUEST, domain_uuid="2" * 36, name="impostor")
OPEN = "set_field:0x3e9->tun_id,goto_table:200"


class Libvirt:
    """Answers when it is let, with what the guests' definitions say."""

    def __init__(self, *ports: Attachment) -> None:
        self.ports = ports
        self.asked = 0
        self.answers = asyncio.Event()
        self.silent = False

    async def definition(self, uuid: str) -> tuple[Attachment, ...]:
        self.asked += 1
        if self.silent:
            raise UnavailableError("no libvirtd")
        await self.answers.wait()
        return tuple(port for port in self.ports if port.domain_uuid == uuid)


def classified(switch: DummySwitch, number: int) -> str:
    """What the switch does with frames from a port by flows of ours; "" when they are the site's."""
    for line in switch.flows("table=0,cookie=0x48ff000000000000/0xffff000000000000"):
        if match := re.search(rf"in_port={number} actions=(.*)", line):
            return match[1]
    return ""


async def plugged(switch: DummySwitch, numbers: dict[str, int], name: str = "vnet0") -> int:
    await asyncio.to_thread(plug, switch, name)
    await until(lambda: name in numbers)
    return numbers[name]


async def test_a_new_guest_is_closed_at_once_and_then_its_tenants(switch: DummySwitch, tmp_path: Path) -> None:
    guests = Libvirt(GUEST)
    async with running(switch, tmp_path, guests.definition) as here:
        number = await plugged(switch, here.bridge.numbers)
        await until(lambda: classified(switch, number) == "drop")
        assert deliveries(switch) == {}
        guests.answers.set()
        await until(lambda: classified(switch, number) == OPEN)
        assert deliveries(switch) == {"202": f"output:{number}", "203": f"output:{number}"}
        before = switch.flows()
        assert await here.tell(told(GUEST))
        assert switch.flows() == before, "the leader says the same"
        assert await here.tell(told(generation=2))
        assert switch.flows() == before, "its definition still says it"
        await asyncio.to_thread(switch.unplug, "vnet0")
        await until(lambda: deliveries(switch) == {})
    assert guests.asked == 1


async def test_a_new_guest_that_is_the_sites_is_let_go(switch: DummySwitch, tmp_path: Path) -> None:
    guests = Libvirt()
    async with running(switch, tmp_path, guests.definition) as here:
        before = switch.flows()
        number = await plugged(switch, here.bridge.numbers)
        await until(lambda: classified(switch, number) == "drop")
        guests.answers.set()
        await until(lambda: switch.flows() == before)


async def test_a_guest_whose_tenant_cannot_be_read_is_not_the_sites(switch: DummySwitch, tmp_path: Path) -> None:
    guests = Libvirt(replace(GUEST, key=Key(NO_TUNNEL, GUEST.key.mac), addresses=()))
    guests.answers.set()
    async with running(switch, tmp_path, guests.definition) as here:
        number = await plugged(switch, here.bridge.numbers)
        await until(lambda: guests.asked == 1)
        # As long as it is in doubt, it is closed for a time only.
        closed = ("--stats", "dump-flows", f"table=0,in_port={number}")
        await until(lambda: "hard_timeout" not in switch.ofctl(*closed) and classified(switch, number) == "drop")
        assert here.ports() == []
        assert await here.tell(told(GUEST))
        assert classified(switch, number) == OPEN


async def test_a_port_that_is_no_guests_is_never_closed(switch: DummySwitch, tmp_path: Path) -> None:
    async with running(switch, tmp_path, Libvirt().definition) as here:
        before = switch.flows()
        await asyncio.to_thread(switch.plug, "eth7")
        await until(lambda: "eth7" in here.bridge.numbers)
        await here.look()
        assert switch.flows() == before


async def test_a_libvirt_that_does_not_answer_keeps_nobody_for_ever(
    switch: DummySwitch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newcomers, "DOUBT_S", 1)
    monkeypatch.setattr(network, "DOUBT_S", 1)
    monkeypatch.setattr(newcomers, "ASK_AGAIN_S", 0.1)
    guests = Libvirt(GUEST)
    guests.silent = True
    async with running(switch, tmp_path, guests.definition) as here:
        number = await plugged(switch, here.bridge.numbers)
        await until(lambda: classified(switch, number) == "drop")
        # The switch does it by itself: the agent may be dead by then.
        await until(lambda: classified(switch, number) == "")
        guests.silent = False
        guests.answers.set()
        await until(lambda: "202" in deliveries(switch))


async def test_a_guest_that_cannot_be_understood_is_nobody_elses_trouble(switch: DummySwitch, tmp_path: Path) -> None:
    async def definition(uuid: str) -> tuple[Attachment, ...]:
        if uuid == OTHER.domain_uuid:
            raise ValueError("what is this?")
        return (GUEST,)

    async with running(switch, tmp_path, definition) as here:
        await asyncio.to_thread(switch.plug, "vnet3", OTHER.domain_uuid, "52:54:00:30:00:77")
        await until(lambda: "vnet3" in here.bridge.numbers)
        number = await plugged(switch, here.bridge.numbers)
        await until(lambda: classified(switch, number) == OPEN)


async def test_what_was_there_before_the_agent_is_not_cut_off(
    switch: DummySwitch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "SETTLE_TIMEOUT_S", 0.1)
    guests = Libvirt(GUEST)
    plug(switch, "vnet0")
    async with running(switch, tmp_path, guests.definition) as here:
        assert classified(switch, here.bridge.numbers["vnet0"]) == ""
        guests.answers.set()
        await until(lambda: "202" in deliveries(switch))


async def test_a_new_life_of_the_agent_knows_whom_nobody_has_told_of(switch: DummySwitch, tmp_path: Path) -> None:
    guests = Libvirt(GUEST)
    guests.answers.set()
    async with running(switch, tmp_path, guests.definition) as here:
        await plugged(switch, here.bridge.numbers)
        await until(lambda: "202" in deliveries(switch))
    before, flows = ages(switch), switch.flows()
    await asyncio.sleep(0.1)
    async with running(switch, tmp_path, guests.definition):
        assert switch.flows() == flows
        assert all(age >= before[cookie] + 0.05 for cookie, age in ages(switch).items())


async def test_a_guest_that_the_record_has_elsewhere_is_closed_until_it_comes(
    switch: DummySwitch, tmp_path: Path
) -> None:
    guests = Libvirt(GUEST)
    guests.answers.set()
    async with running(switch, tmp_path, guests.definition) as here:
        await here.tell(told(ELSEWHERE, PEER))
        number = await plugged(switch, here.bridge.numbers)
        await until(lambda: classified(switch, number) == "drop")
        await here.expect(GUEST.domain_uuid, [GUEST])
        assert classified(switch, number) == OPEN
        await here.not_coming(GUEST.domain_uuid)
        assert classified(switch, number) == "drop"


async def test_a_guest_with_the_address_of_another_stays_closed(switch: DummySwitch, tmp_path: Path) -> None:
    guests = Libvirt(OTHER)
    guests.answers.set()
    async with running(switch, tmp_path, guests.definition) as here:
        await here.tell(told(ELSEWHERE))
        await asyncio.to_thread(switch.plug, "vnet3", OTHER.domain_uuid, OTHER.key.mac)
        await until(lambda: "vnet3" in here.bridge.numbers)
        number = here.bridge.numbers["vnet3"]
        await until(lambda: guests.asked == 1)
        # As long as it is in doubt, it is closed for a time only.
        closed = ("--stats", "dump-flows", f"table=0,in_port={number}")
        await until(lambda: "hard_timeout" not in switch.ofctl(*closed) and classified(switch, number) == "drop")
        await here.tell(told(generation=2))
        assert classified(switch, number) == OPEN


def test_a_claim_takes_nothing_from_anybody() -> None:
    taken = replace(PEER, key=Key(1001, "52:54:00:30:00:0c"), domain_uuid="3")
    elsewhere = replace(taken, key=Key(1002, taken.key.mac))
    free = replace(PEER, key=Key(1001, "52:54:00:30:00:0d"), addresses=("10.30.0.13",), domain_uuid="4")
    later = replace(free, key=Key(1001, "52:54:00:30:00:0e"))
    assert admitted([GUEST, PEER], [OTHER, taken, elsewhere, free, later]) == [elsewhere, free]


class Daemon:
    """A libvirt slot with one guest, or none, or no answer."""

    def __init__(self, tunnel: int = 0, *, active: bool = False, silent: bool = False) -> None:
        self._tunnel, self._active, self._silent = tunnel, active, silent

    async def call(self, fn: Callable[["Daemon"], tuple[bool, str]], timeout_s: float) -> tuple[bool, str]:
        if self._silent:
            raise DeadlineError(f"no answer within {timeout_s} s")
        try:
            return fn(self)
        except libvirt.libvirtError as error:
            raise NotFoundError(str(error)) from None

    def lookupByUUIDString(self, uuid: str) -> "Daemon":  # noqa: N802
        if not self._tunnel:
            raise libvirt.libvirtError(f"no {uuid}")
        return self

    def isActive(self) -> int:  # noqa: N802
        return int(self._active)

    def XMLDesc(self, _flags: int) -> str:  # noqa: N802
        port = f"<h:port mac='{GUEST.key.mac}' tunnel='{self._tunnel}'/>"
        return f"<domain><metadata><h:network xmlns:h='{NAMESPACE}'>{port}</h:network></metadata></domain>"


@pytest.mark.parametrize(
    ("daemons", "tunnels"),
    [
        ((Daemon(7, active=True), Daemon()), [7]),
        ((Daemon(7), Daemon(8, active=True)), [8]),
        ((Daemon(silent=True), Daemon(8)), [8]),
        ((Daemon(), Daemon()), []),
    ],
)
async def test_a_definition_is_that_of_the_slot_where_the_guest_is_active(
    daemons: tuple[Daemon, ...], tunnels: list[int]
) -> None:
    hypervisor = cast(Hypervisor, type("TwoSlots", (), {"slots": daemons}))
    assert [port.key.tunnel for port in await definition_of(hypervisor, "u")] == tunnels


async def test_a_guest_that_a_silent_slot_may_have_is_not_known() -> None:
    hypervisor = cast(Hypervisor, type("TwoSlots", (), {"slots": (Daemon(), Daemon(silent=True))}))
    with pytest.raises(DeadlineError):
        await definition_of(hypervisor, "u")
