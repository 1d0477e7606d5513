"""What the agents tell of real hosts, guests, disks and switch ports, and which guests they refuse."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import grpc
import grpc.aio
import pytest

from handoff.agent.v1 import (
    disk_pb2,
    disk_pb2_grpc,
    flow_pb2,
    flow_pb2_grpc,
    host_pb2,
    host_pb2_grpc,
    qemu_pb2,
    qemu_pb2_grpc,
)
from handoff.agent.v1 import types_pb2 as types
from handoff_common.channel import open_channel
from handoff_lab.fleet import Fleet
from handoff_lab.guest import Guests, virsh
from handoff_lab.state import GuestRecord

pytestmark = pytest.mark.lab
MIB = 1 << 20
BOTH = ("format=qcow2,place=shared", "format=raw,place=local")


@asynccontextmanager
async def agent(fleet: Fleet, host: str) -> AsyncIterator[SimpleNamespace]:
    async with open_channel(f"unix:{fleet.lab.agent_socket(host)}") as channel:
        yield SimpleNamespace(
            host=host_pb2_grpc.HostServiceStub(channel),
            qemu=qemu_pb2_grpc.QemuServiceStub(channel),
            disk=disk_pb2_grpc.DiskServiceStub(channel),
            flow=flow_pb2_grpc.FlowServiceStub(channel),
        )


async def get_host(fleet: Fleet, name: str) -> host_pb2.Host:
    async with agent(fleet, name) as stubs:
        return (await stubs.host.GetHost(host_pb2.GetHostRequest(), timeout=10)).host


async def prepare(fleet: Fleet, host: str, guest: qemu_pb2.SourceGuest) -> str:
    """The destination's judgement of a guest: status and message; nothing happens."""
    async with agent(fleet, host) as stubs:
        request = qemu_pb2.PrepareDestinationRequest(
            fence=await fence(fleet, host), migration_id=str(uuid.uuid4()), guest=guest, slot="a", validate_only=True
        )
        try:
            await stubs.qemu.PrepareDestination(request, timeout=30)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        return "OK"


async def fence(fleet: Fleet, host: str) -> types.Fence:
    return types.Fence(term=max(1, (await get_host(fleet, host)).term), leader="test")


async def source_guest(fleet: Fleet, guest: GuestRecord) -> qemu_pb2.SourceGuest:
    async with agent(fleet, guest.home) as stubs:
        request = qemu_pb2.PrepareSourceRequest(
            fence=await fence(fleet, guest.home),
            migration_id=str(uuid.uuid4()),
            domain_uuid=guest.uuid,
            validate_only=True,
        )
        return (await stubs.qemu.PrepareSource(request, timeout=30)).guest


async def test_a_host_counts_what_its_guests_may_use(fleet: Fleet, guests: Guests) -> None:
    before = await get_host(fleet, "h2")
    await asyncio.to_thread(guests.create, "counted", "h2", memory_mib=128, disks=(), wait=False)
    after = await get_host(fleet, "h2")
    assert before.memory_free_bytes - after.memory_free_bytes == 128 * MIB
    assert [(slot.name, slot.connected) for slot in after.slots] == [("a", True), ("b", True)]
    assert after.slots[0].host_uuid != after.slots[1].host_uuid
    releases = fleet.lab.releases()
    assert [emulator.name for emulator in after.emulators] == [release.name for release in releases]
    for emulator, release in zip(after.emulators, releases, strict=True):
        assert emulator.release.startswith("{}.{}.".format(*release.version))
        assert release.machine in emulator.machine_types
        assert emulator.cpr is release.shares_memory


async def test_a_guest_runs_under_the_build_that_was_asked_for(fleet: Fleet, guests: Guests) -> None:
    for number, release in enumerate(fleet.lab.releases()):
        record = await asyncio.to_thread(
            guests.create, f"under-{number}", "h2", 128, disks=(), wait=False, release=release.name
        )
        async with agent(fleet, "h2") as stubs:
            domain = (await stubs.qemu.GetDomain(qemu_pb2.GetDomainRequest(uuid=record.uuid), timeout=10)).domain
        assert domain.emulator_name == release.name
        assert domain.qemu_release.startswith("{}.{}.".format(*release.version))
        await asyncio.to_thread(guests.delete, record.name)


async def test_disks_and_ports_are_those_of_the_host(fleet: Fleet, guests: Guests) -> None:
    guest = await asyncio.to_thread(guests.create, "looked-at", "h2", disks=BOTH, wait=False)
    async with agent(fleet, "h2") as stubs:
        disks = (await stubs.disk.ListDisks(disk_pb2.ListDisksRequest(domain_uuid=guest.uuid), timeout=10)).disks
        assert [(disk.source, disk.format) for disk in disks] == [(disk.path, disk.format) for disk in guest.disks]
        assert [disk.placement for disk in disks] == [types.DISK_PLACEMENT_SHARED, types.DISK_PLACEMENT_LOCAL]
        assert all(disk.virtual_size_bytes > disk.allocated_bytes for disk in disks)
        request = flow_pb2.ListPortsRequest(domain_uuid=guest.uuid)
        (port,) = (await stubs.flow.ListPorts(request, timeout=10)).ports
        ofport = fleet.node("h2").run(["ovs-vsctl", "get", "Interface", port.name, "ofport"]).stdout
        assert (port.bridge, port.mac, port.domain_uuid) == ("br-int", guest.mac, guest.uuid)
        assert port.ofport == int(ofport)
        domain = (await stubs.qemu.GetDomain(qemu_pb2.GetDomainRequest(uuid=guest.uuid), timeout=10)).domain
        assert [(each.mac, each.source, each.tap) for each in domain.interfaces] == [(guest.mac, "br-int", port.name)]


async def test_events_of_a_guest(fleet: Fleet, guests: Guests) -> None:
    async with agent(fleet, "h2") as stubs:
        stream = stubs.host.WatchEvents(host_pb2.WatchEventsRequest(), timeout=60)
        await stream.read()
        guest = await asyncio.to_thread(guests.create, "watched", "h2", disks=(), wait=False)
        await asyncio.to_thread(virsh, fleet.host("h2"), "a", "suspend", "watched")
        kinds: list[str] = []
        while "suspended" not in kinds:
            event = (await stream.read()).domain
            if event.uuid == guest.uuid:
                kinds.append(event.kind)
        assert sorted(kinds) == ["defined", "resumed", "started", "suspended"]
        stream.cancel()


async def test_a_guest_that_can_go_is_told_where_it_can_not(fleet: Fleet, guests: Guests) -> None:
    record = await asyncio.to_thread(guests.create, "traveller", "h2", wait=False)
    guest = await source_guest(fleet, record)
    assert await prepare(fleet, "h3", guest) == "OK"
    assert (await prepare(fleet, "h2", guest)).startswith("FAILED_PRECONDITION: host h2 already has a domain with")

    def changed(**fields: object) -> qemu_pb2.SourceGuest:
        other = qemu_pb2.SourceGuest()
        other.CopyFrom(guest)
        for name, value in fields.items():
            setattr(other.domain, name, value)
        return other

    assert (await prepare(fleet, "h3", changed(memory_bytes=1 << 40))).startswith("RESOURCE_EXHAUSTED: host h3 has")
    assert "lacks QEMU 9.9.9" in await prepare(fleet, "h3", changed(qemu_release="9.9.9"))
    assert "has no machine type vax" in await prepare(fleet, "h3", changed(machine_type="vax"))
    without_bridge = changed()
    without_bridge.domain.interfaces[0].source = "br-none"
    assert "host h3 has no bridge or network br-none" in await prepare(fleet, "h3", without_bridge)
