"""HostService, DiskService and what they stand on, against a real libvirtd and QEMU."""

import asyncio
import contextlib
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc.aio
import libvirt
import libvirt_qemu
import pytest

from handoff.agent.v1 import disk_pb2, disk_pb2_grpc, host_pb2, host_pb2_grpc
from handoff.agent.v1 import types_pb2 as types
from handoff_agent.disk_service import DiskService
from handoff_agent.emulators import Emulators
from handoff_agent.handoff_changes import HandoffChanges
from handoff_agent.host_service import HostService, free_memory_bytes
from handoff_agent.inventory import Inventory
from handoff_agent.movable import SourceFacts, destination_obstacles, obstacles
from handoff_agent.settings import AgentSettings, EmulatorSettings, SlotSettings
from handoff_agent.shared_storage import shared_storage
from handoff_agent.slots import Hypervisor, Slot
from handoff_agent.survey import Survey
from handoff_common.errors import NotFoundError, UnavailableError
from handoff_common.server import Server

QEMU = "/usr/bin/qemu-system-x86_64"
MEMORY_MIB = 64


@dataclass(frozen=True)
class Agent:
    """The parts of an agent that these tests need."""

    settings: AgentSettings
    hypervisor: Hypervisor
    emulators: Emulators
    inventory: Inventory
    survey: Survey
    changes: HandoffChanges
    host: Any
    disks: Any


@pytest.fixture
async def agent(libvirtd: str, tmp_path: Path) -> AsyncIterator[Agent]:
    settings = AgentSettings(
        name="h1",
        migration_address="127.0.0.1",
        shared_paths=(str(tmp_path / "shared"),),
        memory_mib=1024,
        slots={"a": SlotSettings(uri=libvirtd)},
        emulators=(EmulatorSettings(name="stable", path=QEMU),),
    )
    (tmp_path / "shared").mkdir()
    slots = [Slot(name, slot.uri) for name, slot in settings.slots.items()]
    async with contextlib.AsyncExitStack() as stack:
        hypervisor = await stack.enter_async_context(Hypervisor(slots).running())
        assert await slots[0].wait_connected(10)

        async def capabilities(path: str, virtualisation: str) -> str:
            return await slots[0].call(lambda c: c.getDomainCapabilities(path, None, None, virtualisation), 40)

        emulators = Emulators(settings.emulators, capabilities)
        await emulators.probe()
        inventory = Inventory(hypervisor, emulators, settings.shared_paths)
        survey = Survey(settings, hypervisor, emulators, inventory)
        stack.callback(survey.close)
        changes = HandoffChanges()
        server = Server(["handoff.agent.v1.HostService", "handoff.agent.v1.DiskService"])
        host_pb2_grpc.add_HostServiceServicer_to_server(
            HostService(settings, hypervisor, emulators, inventory, changes, lambda: 7), server.grpc_server
        )
        disk_pb2_grpc.add_DiskServiceServicer_to_server(DiskService(hypervisor, inventory), server.grpc_server)
        address = f"unix:{tmp_path}/agent.sock"
        await server.start([address])
        stack.push_async_callback(server.stop, 0.1)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        yield Agent(
            settings,
            hypervisor,
            emulators,
            inventory,
            survey,
            changes,
            host_pb2_grpc.HostServiceStub(channel),
            disk_pb2_grpc.DiskServiceStub(channel),
        )


@pytest.fixture
def connection(libvirtd: str) -> Iterator[libvirt.virConnect]:
    connection = libvirt.open(libvirtd)
    yield connection
    connection.close()


@pytest.fixture
def guest(connection: libvirt.virConnect, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A paused guest with a shared and a local disk and an empty drive."""
    shared, local = tmp_path / "shared" / "a.qcow2", tmp_path / "b.raw"
    shared.parent.mkdir(exist_ok=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", shared, "1G"], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "raw", local, "8M"], check=True)
    name, identity = f"g-{uuid.uuid4().hex[:6]}", str(uuid.uuid4())
    domain = connection.createXML(
        f"""<domain type='qemu'><name>{name}</name><uuid>{identity}</uuid><memory unit='MiB'>{MEMORY_MIB}</memory>
        <vcpu>1</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os><devices><emulator>{QEMU}</emulator>
        <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{shared}'/>
        <target dev='vda' bus='virtio'/></disk>
        <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{local}'/>
        <target dev='vdb' bus='virtio'/></disk>
        <disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>
        <interface type='user'><mac address='52:54:00:00:00:01'/></interface>
        </devices></domain>""",
        libvirt.VIR_DOMAIN_START_PAUSED,
    )
    yield SimpleNamespace(domain=domain, name=name, uuid=identity, shared=str(shared), local=str(local))
    with contextlib.suppress(libvirt.libvirtError):  # faster than destroy, which asks first
        libvirt_qemu.qemuMonitorCommand(domain, '{"execute": "quit"}', 0)


async def test_host(agent: Agent, guest: SimpleNamespace) -> None:
    host = (await agent.host.GetHost(host_pb2.GetHostRequest(), timeout=10)).host
    assert (host.name, host.term, host.migration_address) == ("h1", 7, "127.0.0.1")
    (slot,) = host.slots
    assert (slot.name, slot.connected) == ("a", True)
    assert uuid.UUID(slot.host_uuid)
    assert slot.libvirt_version.count(".") == 2
    (emulator,) = host.emulators
    assert (emulator.path, emulator.name) == (QEMU, "stable")
    assert emulator.release.count(".") == 2
    assert host.memory_bytes == 1 << 30
    assert host.memory_free_bytes == (1024 - MEMORY_MIB) << 20
    assert host.cpus > 0
    assert host.cpu_model
    assert host.agent_version
    assert host.start_time.seconds > 0


def test_memory_accounting() -> None:
    domains = [
        types.Domain(memory_bytes=10, state=types.DOMAIN_STATE_RUNNING, slot="a"),
        types.Domain(memory_bytes=20, state=types.DOMAIN_STATE_PAUSED, slot="b"),
        types.Domain(memory_bytes=40, state=types.DOMAIN_STATE_OTHER, slot="b"),
        types.Domain(memory_bytes=80, state=types.DOMAIN_STATE_SHUT_OFF, slot="a"),
    ]
    assert free_memory_bytes(100, domains) == 30
    assert free_memory_bytes(50, domains) == 0


async def test_events(agent: Agent, guest: SimpleNamespace) -> None:
    stream = agent.host.WatchEvents(host_pb2.WatchEventsRequest(), timeout=20)
    opened = await stream.read()
    assert opened.WhichOneof("event") is None
    seen = []

    async def until(kind: str) -> None:
        while not seen or seen[-1] != kind:
            message = await stream.read()
            if message.domain.uuid == guest.uuid:
                seen.append(message.domain.kind)
                states[message.domain.kind] = message.domain.state

    states: dict[str, types.DomainState.ValueType] = {}
    await asyncio.to_thread(guest.domain.resume)
    await until("resumed")
    await asyncio.to_thread(guest.domain.suspend)
    await until("suspended")
    await asyncio.to_thread(guest.domain.destroy)
    await until("stopped")
    # Others may come too: "started" may be late, and QEMU says "shutdown" when it gets its SIGTERM in time.
    assert {kind: states[kind] for kind in ("resumed", "suspended", "stopped")} == {
        "resumed": types.DOMAIN_STATE_RUNNING,
        "suspended": types.DOMAIN_STATE_PAUSED,
        "stopped": types.DOMAIN_STATE_SHUT_OFF,
    }
    agent.changes.publish("m1")
    while (message := await stream.read()).WhichOneof("event") != "handoff_migration_id":
        pass
    assert message.handoff_migration_id == "m1"
    stream.cancel()


async def test_events_end_when_some_were_lost(agent: Agent) -> None:
    stream = agent.host.WatchEvents(host_pb2.WatchEventsRequest(), timeout=20)
    await stream.read()
    await agent.hypervisor.slots[0].call(lambda connection: connection.close())
    await agent.hypervisor.slots[0].close()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stream.read()
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "list again" in (raised.value.details() or "")


async def test_disks(agent: Agent, guest: SimpleNamespace) -> None:
    request = disk_pb2.ListDisksRequest(domain_uuid=guest.uuid)
    disks = (await agent.disks.ListDisks(request, timeout=10)).disks
    assert [(disk.target, disk.source, disk.placement) for disk in disks] == [
        ("vda", guest.shared, types.DISK_PLACEMENT_SHARED),
        ("vdb", guest.local, types.DISK_PLACEMENT_LOCAL),
        ("sda", "", types.DISK_PLACEMENT_EMPTY),
    ]
    assert [disk.virtual_size_bytes for disk in disks] == [1 << 30, 8 << 20, 0]
    assert 0 < disks[0].allocated_bytes < 1 << 20


async def test_disks_of_an_unknown_domain(agent: Agent) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await agent.disks.ListDisks(disk_pb2.ListDisksRequest(domain_uuid=str(uuid.uuid4())), timeout=10)
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


async def test_inventory(agent: Agent, guest: SimpleNamespace) -> None:
    domain = await agent.inventory.domain(guest.uuid)
    assert domain in await agent.inventory.domains()
    assert (domain.name, domain.slot, domain.state) == (guest.name, "a", types.DOMAIN_STATE_PAUSED)
    assert (domain.persistent, domain.autostart) == (False, False)
    assert domain.memory_bytes == MEMORY_MIB << 20
    assert domain.machine_type.startswith("pc-q35-")
    assert domain.qemu_release == agent.emulators.releases[QEMU]
    assert domain.interfaces[0].mac == "52:54:00:00:00:01"


async def test_source_survey(agent: Agent, guest: SimpleNamespace, tmp_path: Path) -> None:
    domain = await agent.inventory.domain(guest.uuid)
    facts = await agent.survey.source_facts(domain)
    assert facts == SourceFacts(live_xml=guest.domain.XMLDesc(0))
    is_shared = shared_storage(agent.settings.shared_paths)
    assert list(obstacles(domain, facts, is_shared=is_shared)) == []
    copy = f"<disk type='file'><source file='{tmp_path}/copy'/><driver type='raw'/></disk>"
    guest.domain.blockCopy("vdb", copy, flags=libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB)
    busy = await agent.survey.source_facts(domain)
    assert busy.block_jobs == ("vdb",)
    guest.domain.blockJobAbort("vdb", 0)


async def test_backing_chain_is_in_the_live_xml(
    agent: Agent, connection: libvirt.virConnect, tmp_path: Path, guest: SimpleNamespace
) -> None:
    overlay = tmp_path / "shared" / "overlay.qcow2"
    subprocess.run(  # noqa: ASYNC221
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", guest.local, "-F", "raw", overlay], check=True
    )
    guest.domain.destroy()
    name = f"o-{uuid.uuid4().hex[:6]}"
    domain = connection.createXML(
        f"""<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory>
        <os><type arch='x86_64' machine='q35'>hvm</type></os><devices><emulator>{QEMU}</emulator>
        <disk type='file'><driver name='qemu' type='qcow2'/><source file='{overlay}'/><target dev='vda'/></disk>
        </devices></domain>""",
        libvirt.VIR_DOMAIN_START_PAUSED,
    )
    try:
        found = await agent.inventory.domain(domain.UUIDString())
        is_shared = shared_storage(agent.settings.shared_paths)
        facts = await agent.survey.source_facts(found)
        (reason,) = obstacles(found, facts, is_shared=is_shared)
        assert f"disk vda is backed by {guest.local} on this host alone" in reason
    finally:
        domain.destroy()


async def test_host_survey(agent: Agent, guest: SimpleNamespace) -> None:
    newcomer = types.Domain()
    newcomer.CopyFrom(await agent.inventory.domain(guest.uuid))
    newcomer.uuid, newcomer.name = str(uuid.uuid4()), "newcomer"
    newcomer.interfaces[0].source = "lo"
    newcomer.cpu_model = "qemu64"
    facts = await agent.survey.host_facts(newcomer, "a")
    assert facts.memory_free_bytes == (1024 - MEMORY_MIB) << 20
    assert (guest.name in facts.names, guest.uuid in facts.uuids) == (True, True)
    assert destination_obstacles(newcomer, facts) == ()
    newcomer.interfaces[0].source = "no-such-bridge"
    newcomer.disks[0].source += ".gone"
    newcomer.cpu_model = "no-such-model"
    newcomer.memory_bytes = 1 << 40
    facts = await agent.survey.host_facts(newcomer, "a")
    assert len(destination_obstacles(newcomer, facts)) == 4


async def test_host_survey_needs_every_slot(agent: Agent, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        await agent.survey.host_facts(types.Domain(), "z")
    slots = (*agent.hypervisor.slots, Slot("b", f"qemu+unix:///system?socket={tmp_path}/none"))
    survey = Survey(agent.settings, Hypervisor(slots), agent.emulators, agent.inventory)
    with pytest.raises(UnavailableError, match="slot b has no libvirtd"):
        await survey.host_facts(types.Domain(), "a")
    survey.close()
