"""Gathers the facts that movable.py judges."""

import asyncio
import os
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final

import libvirt

from handoff.agent.v1 import qemu_pb2 as pb
from handoff.agent.v1 import types_pb2 as types
from handoff_agent.emulators import Emulators
from handoff_agent.host_service import free_memory_bytes
from handoff_agent.inventory import Inventory
from handoff_agent.monitor import Monitor, QmpError
from handoff_agent.movable import HostFacts, SourceFacts
from handoff_agent.outgoing import set_mode
from handoff_agent.settings import AgentSettings
from handoff_agent.slots import Hypervisor, LibvirtFailure, Slot
from handoff_common.errors import DeadlineError, UnavailableError

LOCAL_METHODS: Final = (pb.TRANSFER_METHOD_UNIX, pb.TRANSFER_METHOD_CPR)
# Network file systems block the one who looks until they are back.
PATHS_TIMEOUT_S: Final = 5.0


class Survey:
    """Looks at guests that want to leave, and at this host for guests that want to come."""

    def __init__(
        self, settings: AgentSettings, hypervisor: Hypervisor, emulators: Emulators, inventory: Inventory
    ) -> None:
        self._settings = settings
        self._hypervisor = hypervisor
        self._emulators = emulators
        self._inventory = inventory
        self._paths = ThreadPoolExecutor(2, "paths")

    def close(self) -> None:
        """Takes no more questions."""
        self._paths.shutdown(wait=False, cancel_futures=True)

    async def source_facts(self, guest: types.Domain) -> SourceFacts:
        """What `obstacles` needs to know of a guest here. Raises as Slot.call does, and QmpError."""
        slot = self._hypervisor.slot(guest.slot)
        targets = [disk.target for disk in guest.disks if disk.placement != types.DISK_PLACEMENT_EMPTY]
        is_active = guest.state in (types.DOMAIN_STATE_RUNNING, types.DOMAIN_STATE_PAUSED)

        def read(domain: libvirt.virDomain) -> SourceFacts:
            return SourceFacts(
                live_xml=domain.XMLDesc(0),
                block_jobs=tuple(target for target in targets if is_active and domain.blockJobInfo(target)),
                snapshots=domain.snapshotNum(),
                checkpoints=len(domain.listAllCheckpoints()),
            )

        facts = await slot.on_domain(guest.uuid, read)
        if not is_active:
            return facts
        migration = await Monitor(slot, guest.uuid).query_migrate()
        return replace(facts, blocked_reasons=migration.blocked_reasons)

    async def device_types(self, guest: types.Domain) -> Sequence[str]:
        """The types of a guest's devices, sorted, by its QEMU's word. Raises as Monitor.execute does."""
        return sorted(await Monitor(self._hypervisor.slot(guest.slot), guest.uuid).query_device_types())

    async def cpr_obstacles(self, guest: types.Domain) -> tuple[str, ...]:
        """Why the guest's QEMU can't pass its memory on, by its own word. Raises as Monitor.execute does."""
        monitor = Monitor(self._hypervisor.slot(guest.slot), guest.uuid)
        release = guest.qemu_release or "its QEMU"
        try:
            if not await set_mode(monitor, "cpr-transfer"):
                return (f"QEMU {release}, which runs it now, does not know cpr-transfer",)
        except QmpError as error:
            return (f"QEMU {release}, which runs it now, can't pass memory on: {error.desc}",)
        try:
            return (await monitor.query_migrate()).blocked_reasons
        finally:
            await set_mode(monitor, "normal")

    async def host_facts(
        self,
        guest: types.Domain,
        slot_name: str,
        method: pb.TransferMethod.ValueType = pb.TRANSFER_METHOD_TCP,
        emulator: str = "",
    ) -> HostFacts:
        """What `destination_obstacles` needs to know of this host for a guest from elsewhere, or from another slot.

        Raises NotFoundError for an unknown slot, UnavailableError when a slot has no libvirtd, and DeadlineError when
        a libvirtd or the storage does not answer.
        """
        slot = self._hypervisor.slot(slot_name)
        for each in self._hypervisor.slots:
            if not each.connected:
                raise UnavailableError(
                    f"host {self._settings.name}: slot {each.name} has no libvirtd, so what it uses is not known;"
                    " start it first"
                )
        local = method in LOCAL_METHODS
        domains = await self._inventory.domains()
        free_bytes = free_memory_bytes(self._settings.guest_memory_bytes(), domains)
        if method == pb.TRANSFER_METHOD_CPR:  # the memory stays the same
            free_bytes += guest.memory_bytes
        return HostFacts(
            name=self._settings.name,
            memory_free_bytes=free_bytes,
            names=frozenset(domain.name for domain in domains if domain.slot == slot_name),
            uuids=frozenset(domain.uuid for domain in domains if not (local and domain.slot == guest.slot)),
            builds=self._emulators.builds,
            bridges=frozenset(name for _, name in socket.if_nameindex()) | await _networks(slot),
            missing_paths=await self._missing(
                [disk.source for disk in guest.disks if disk.placement == types.DISK_PLACEMENT_SHARED]
            ),
            emulator=emulator,
        )

    async def _missing(self, paths: Sequence[str]) -> frozenset[str]:
        look = asyncio.get_running_loop().run_in_executor(self._paths, _missing_of, paths)
        try:
            async with asyncio.timeout(PATHS_TIMEOUT_S):
                return await look
        except TimeoutError:
            raise DeadlineError(
                f"host {self._settings.name}: the storage below {', '.join(paths)} did not answer within"
                f" {PATHS_TIMEOUT_S:g} s"
            ) from None


async def _networks(slot: Slot) -> frozenset[str]:
    def read(connection: libvirt.virConnect) -> frozenset[str]:
        active = connection.listAllNetworks(libvirt.VIR_CONNECT_LIST_NETWORKS_ACTIVE)
        return frozenset(network.name() for network in active)

    try:
        return await slot.call(read)
    except LibvirtFailure:  # built or installed without its network driver
        return frozenset()


def _missing_of(paths: Sequence[str]) -> frozenset[str]:
    return frozenset(path for path in paths if not os.path.exists(path))  # noqa: PTH110 - Path.exists raises EACCES
