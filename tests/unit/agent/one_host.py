"""A guest that goes from one slot of its host to the other: two real libvirtds, one agent, QEMU 10."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import libvirt
from builds import QEMU, Builds
from ports import port
from processes import incoming_qemu

from handoff.agent.v1 import qemu_pb2 as pb
from handoff_agent.arrival import Arrivals
from handoff_agent.companions import Companions, NoCompanions
from handoff_agent.convergence import ConvergenceSettings
from handoff_agent.departure import Departures
from handoff_agent.destination import Listener
from handoff_agent.disks.plan import Place
from handoff_agent.disks.plans import DiskPlans
from handoff_agent.handoff_changes import HandoffChanges
from handoff_agent.handoffs import Handoffs
from handoff_agent.inventory import Inventory
from handoff_agent.ledger import Ledger, TermGuard
from handoff_agent.local_sockets import LocalSockets
from handoff_agent.monitor import Monitor
from handoff_agent.rules import (
    ABORTED,
    DESTINATION,
    FAILED,
    HELD,
    PREPARED,
    READY,
    SOURCE,
    TRANSFERRING,
    Call,
    State,
)
from handoff_agent.settings import AgentSettings, SlotSettings
from handoff_agent.slots import Hypervisor, Slot
from handoff_agent.survey import Survey

UNIX, CPR = pb.TRANSFER_METHOD_UNIX, pb.TRANSFER_METHOD_CPR
LIMITS = ConvergenceSettings(300)


class Upgrade:
    """One guest of one host, and the agent of both slots."""

    def __init__(self, uris: tuple[str, str], builds: Builds, directory: Path) -> None:
        self.directory = directory
        self.slots = {name: Slot(name, uri) for name, uri in zip("ab", uris, strict=True)}
        self.paths = builds.paths
        self.settings = AgentSettings(
            name="h1",
            migration_address="127.0.0.1",
            memory_mib=1024,
            slots={name: SlotSettings(uri=slot.uri) for name, slot in self.slots.items()},
            emulators=builds.settings,
        )
        self.hypervisor = Hypervisor(list(self.slots.values()))
        self.emulators = builds.emulators
        self.id, self.guest = f"u-{uuid.uuid4().hex[:8]}", str(uuid.uuid4())
        self.companions: Companions = NoCompanions()
        self.handoffs: Handoffs

    async def start(self) -> None:
        inventory = Inventory(self.hypervisor, self.emulators, ())
        survey = Survey(self.settings, self.hypervisor, self.emulators, inventory)
        self.handoffs = Handoffs(
            self.hypervisor,
            Departures(self.hypervisor, inventory, survey, ()),
            Arrivals(survey, self.emulators, "127.0.0.1", DiskPlans("h1", "standard", Place(), ThreadPoolExecutor(1))),
            Listener("127.0.0.1", port(32), port(40)),
            LocalSockets(self.directory / "run", "root"),
            Ledger(self.directory),
            TermGuard(self.directory),
            HandoffChanges(),
            self.companions,
        )
        await self.handoffs.open()

    async def restart(self) -> None:
        await self.handoffs.close()
        await self.start()

    def define(self, connection: libvirt.virConnect, *, shared: bool = True) -> None:
        backing = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>" if shared else ""
        extra = "<qemu:arg value='-machine'/><qemu:arg value='aux-ram-share=on'/>" if shared else ""
        domain = connection.defineXML(
            f"""<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
            <name>g-{self.guest[:6]}</name><uuid>{self.guest}</uuid><memory unit='MiB'>128</memory>{backing}
            <vcpu>1</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features><devices>
            <emulator>{QEMU}</emulator></devices><qemu:commandline>{extra}</qemu:commandline></domain>"""
        )
        domain.setAutostart(1)
        domain.create()

    async def prepare(self, method: pb.TransferMethod.ValueType, emulator: str = "new") -> str:
        _, guest = await self.handoffs.prepare_source(self.id, self.guest, validate_only=False, local=True)
        if method == CPR:
            assert list(guest.cpr_obstacles) == []
        prepared = await self.handoffs.prepare_destination(
            self.id, guest, "b", validate_only=False, method=method, emulator=emulator
        )
        return prepared.handoff.listen_uri

    async def until(self, *states: State) -> pb.Handoff:
        handoff = self.handoffs.get(self.id, SOURCE)
        async with asyncio.timeout(30):
            while True:
                change = handoff.next_change()
                message = handoff.to_message()
                if message.state in (*states, FAILED):
                    return message
                await change.wait()

    async def advance(self, method: pb.TransferMethod.ValueType, goal: State) -> None:
        uri = await self.prepare(method)
        if goal == PREPARED:
            return
        source = self.handoffs.source(self.id, Call.START_TRANSFER)
        await source.start_transfer(uri, LIMITS, 0, 2.0)
        if goal == TRANSFERRING:
            return
        ready = await self.until(READY)
        assert ready.state == READY, ready.message
        if goal == READY:
            return
        await source.switch_over()
        if goal == HELD:
            held = await self.until(HELD)
            assert held.state == HELD, held.message

    def new_qemu(self) -> int:
        """Process id of the guest's QEMU in slot b, when it came to slot a by being started there."""
        return incoming_qemu(self.guest)

    async def abort(self) -> None:
        for role in (DESTINATION, SOURCE):
            assert (await self.handoffs.abort(self.id, role, "the test says so")).state == ABORTED

    async def status(self, slot: str) -> str:
        return await Monitor(self.slots[slot], self.guest).query_status()

    async def is_only_in(self, slot: str) -> None:
        assert [each.name for each, _ in await domains(self.hypervisor)] == [slot]
        assert await self.status(slot) == "running"
        sockets = self.directory / "run" / "handoffs"
        assert not sockets.exists() or not list(sockets.iterdir())


@contextlib.asynccontextmanager
async def upgrading(uris: tuple[str, str], builds: Builds, directory: Path) -> AsyncIterator[Upgrade]:
    """An agent with a guest that runs in slot a."""
    found = Upgrade(uris, builds, directory)
    async with found.hypervisor.running():
        for slot in found.slots.values():
            assert await slot.wait_connected(10)
        await found.start()
        await found.slots["a"].call(found.define)
        yield found
        await found.handoffs.close()
        await remove_all(found.hypervisor)


async def domains(hypervisor: Hypervisor) -> list[tuple[Slot, str]]:
    """The UUIDs of all domains, active or only defined, and where they are."""
    return [
        (slot, guest)
        for slot in hypervisor.slots
        for guest in await slot.call(lambda connection: [each.UUIDString() for each in connection.listAllDomains()])
    ]


async def remove_all(*hypervisors: Hypervisor) -> None:
    """Ends every domain, all at once: libvirt takes 0.2 s for each."""
    found = [each for hypervisor in hypervisors for each in await domains(hypervisor)]
    await asyncio.gather(*(slot.on_domain(guest, remove) for slot, guest in found))


def remove(domain: libvirt.virDomain) -> None:
    for end in (domain.destroy, domain.undefine):
        with contextlib.suppress(libvirt.libvirtError):
            end()
