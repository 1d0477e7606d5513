"""Where tenants' ports are by the records, and what each host is told."""

import asyncio
from collections.abc import Callable, Sequence
from typing import cast

import pytest
from pydantic import ValidationError

from handoff.agent.v1 import host_pb2
from handoff.agent.v1.flow_pb2 import NetworkPort
from handoff.agent.v1.types_pb2 import Domain, Fence, Interface
from handoff.controller.v1.guests_pb2 import Guest
from handoff.controller.v1.hosts_pb2 import Host, HostState
from handoff.controller.v1.migrations_pb2 import Migration, Placement
from handoff_common.errors import UnavailableError
from handoff_controller.agents import Agents
from handoff_controller.network import FabricView, told_to
from handoff_controller.network_keeper import NetworkKeeper
from handoff_controller.settings import StaticPortSettings
from handoff_controller.store import Store

MAC = "52:54:00:30:00:0a"


def a_host(name: str, *domains: Domain, address: str | None = None, state: int = HostState.HOST_STATE_UP) -> Host:
    number = name.removeprefix("h")
    detail = host_pb2.Host(name=name, tunnel_address=f"10.21.0.{number}" if address is None else address)
    return Host(name=name, detail=detail, domains=domains, state=state)


def a_domain(uuid: str = "u1", mac: str = MAC, tunnel: int = 1001, ip: str = "10.30.0.10") -> Domain:
    return Domain(uuid=uuid, name=uuid, interfaces=[Interface(mac=mac, tunnel=tunnel, ips=[ip]), Interface(mac="02::")])


def a_guest(uuid: str = "u1", host: str = "h1") -> Guest:
    return Guest(uuid=uuid, name=uuid, owner=Placement(host=host, slot="a"))


def test_a_guest_is_where_the_record_has_it_and_hosts_are_told_from_their_side() -> None:
    hosts = [a_host("h1"), a_host("h2", a_domain())]
    [port] = FabricView(()).ports(hosts, [a_guest()], {})
    assert (port.tunnel, port.mac, port.ips, port.tunnel_address) == (1001, MAC, ("10.30.0.10",), "10.21.0.1")
    assert told_to("10.21.0.1", [port])[0].tunnel_address == ""
    assert told_to("10.21.0.2", [port])[0].tunnel_address == "10.21.0.1"


def test_a_guest_on_its_way_floods_to_both() -> None:
    migration = Migration(destination=Placement(host="h2"))
    hosts = [a_host("h1", a_domain()), a_host("h2"), a_host("h3")]
    [port] = FabricView(()).ports(hosts, [a_guest()], {"u1": migration})
    assert [told_to(f"10.21.0.{n}", [port])[0].arriving_at for n in (1, 2, 3)] == ["10.21.0.2", "", "10.21.0.2"]
    [port] = FabricView(()).ports(hosts, [a_guest(host="h2")], {"u1": migration})
    assert port.arriving_at == "", "it is there"


def test_a_report_without_a_guest_takes_it_off_no_network() -> None:
    view = FabricView(())
    before = view.ports([a_host("h1", a_domain()), a_host("h2")], [a_guest()], {})
    assert view.ports([a_host("h1"), a_host("h2")], [a_guest()], {}) == before
    assert view.ports([a_host("h1"), a_host("h2")], [], {}) == ()
    assert view.ports([a_host("h1"), a_host("h2")], [a_guest()], {}) == (), "it was forgotten with its record"


def test_hosts_without_tunnels_and_interfaces_without_tenants_have_no_ports() -> None:
    assert FabricView(()).ports([a_host("h1", a_domain(), address="")], [a_guest()], {}) == ()
    assert FabricView(()).ports([a_host("h1", a_domain(tunnel=0))], [a_guest()], {}) == ()


def test_of_two_ports_with_one_address_the_first_has_it() -> None:
    twin, clash = a_domain("u2"), a_domain("u3", mac="52:54:00:30:00:0b")
    same_in_another_tenant = a_domain("u4", tunnel=1002)
    hosts = [a_host("h1", a_domain(), twin, clash, same_in_another_tenant)]
    guests = [a_guest(uuid) for uuid in ("u1", "u2", "u3", "u4")]
    assert [port.name for port in FabricView(()).ports(hosts, guests, {})] == ["u1", "u4"]


def test_ports_that_are_no_guests() -> None:
    gateway = StaticPortSettings(
        mac="02:00:00:30:00:FE", tunnel=1001, ips=("10.30.0.254",), any_source=True, host="h3", interface="gw0"
    )
    appliance = StaticPortSettings(mac="02:00:00:30:00:fd", tunnel=1001, vtep="10.21.0.9")
    unknown = StaticPortSettings(mac="02:00:00:30:00:fc", tunnel=1001, host="h9", interface="gw0")
    ports = FabricView((gateway, appliance, unknown)).ports([a_host("h3")], [], {})
    assert [(port.mac, port.tunnel_address, port.any_source) for port in ports] == [
        ("02:00:00:30:00:fd", "10.21.0.9", False),
        ("02:00:00:30:00:fe", "10.21.0.3", True),
    ]
    assert ports[1].name == "gw0"


@pytest.mark.parametrize("where", [{}, {"host": "h1"}, {"host": "h1", "interface": "x", "vtep": "10.0.0.1"}])
def test_a_port_that_is_no_guests_is_somewhere(where: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="say where it is"):
        StaticPortSettings.model_validate({"mac": "02:00:00:30:00:fe", "tunnel": 1, **where})


class Listener:
    """An agent that is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, list[NetworkPort]]] = []
        self.away = False
        self.hangs = False

    async def set_network(self, fence: Fence, generation: int, ports: Sequence[NetworkPort]) -> bool:
        if self.hangs:
            await asyncio.Event().wait()
        if self.away:
            raise UnavailableError("it does not answer")
        self.told.append((generation, list(ports)))
        return True


class Records(dict[str, Listener]):
    """Agents, and the records that the store would have."""

    def __init__(self, *hosts: Host) -> None:
        super().__init__({host.name: Listener() for host in hosts})
        self.hosts_now = list(hosts)
        self.guests_now = [a_guest()]

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self))

    async def hosts(self) -> tuple[Host, ...]:
        return tuple(self.hosts_now)

    async def guests(self) -> tuple[Guest, ...]:
        return tuple(self.guests_now)


def a_keeper(records: Records) -> NetworkKeeper:
    return NetworkKeeper(cast(Agents, records), cast(Store, records), Fence(term=7, leader="c1"), FabricView(()), dict)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - there is nothing to be told by
            await asyncio.sleep(0.01)


async def test_all_hosts_are_told_when_something_changes_and_only_then() -> None:
    records = Records(a_host("h1", a_domain()), a_host("h2"), a_host("h3", address=""))
    keeper = a_keeper(records)
    work = asyncio.create_task(keeper.run())
    try:
        await until(lambda: records["h1"].told and records["h2"].told)
        keeper.look_again()
        records["h2"].away = True
        records.guests_now = [a_guest(host="h2")]
        keeper.look_again()
        await until(lambda: len(records["h1"].told) == 2)
        assert [generation for generation, _ in records["h1"].told] == [1, 2]
        assert records["h1"].told[1][1][0].tunnel_address == "10.21.0.2"
        records["h2"].away = False
        keeper.look_again()
        await until(lambda: len(records["h2"].told) == 2)
        assert records["h3"].told == [], "it manages no flows"
        assert len(records["h1"].told) == 2
    finally:
        work.cancel()
        await asyncio.wait({work})


async def test_no_host_waits_for_one_that_hangs() -> None:
    records = Records(a_host("h1", a_domain()), a_host("h2"))
    records["h2"].hangs = True
    keeper = a_keeper(records)
    work = asyncio.create_task(keeper.run())
    try:
        await until(lambda: records["h1"].told)
        records.guests_now = [a_guest(host="h2")]
        keeper.look_again()
        await until(lambda: len(records["h1"].told) == 2)
    finally:
        work.cancel()
        await asyncio.wait({work})


async def test_pointing_says_who_has_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handoff_controller.network_keeper.POINTING_TIMEOUT_S", 0.1)
    down = HostState.HOST_STATE_DOWN
    records = Records(a_host("h1", a_domain()), a_host("h2"), a_host("h3"), a_host("h4", state=down))
    keeper = a_keeper(records)
    records["h2"].hangs = True
    records["h3"].away = True
    assert await keeper.point() == "h2, h3, h4"
    records["h2"].hangs = records["h3"].away = False
    assert await keeper.point() == "h4"
    assert len(records["h1"].told) == 1


async def test_nobody_is_told_before_every_host_was_looked_at() -> None:
    records = Records(a_host("h1", a_domain()), a_host("h2"))
    records.hosts_now = records.hosts_now[:1]
    keeper = a_keeper(records)
    work = asyncio.create_task(keeper.run())
    try:
        await asyncio.sleep(0.1)
        assert records["h1"].told == []
        records.hosts_now.append(a_host("h2"))
        keeper.look_again()
        await until(lambda: records["h1"].told and records["h2"].told)
    finally:
        work.cancel()
        await asyncio.wait({work})
