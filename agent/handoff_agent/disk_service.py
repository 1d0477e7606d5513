"""DiskService: the disks of the host's guests, with their sizes."""

from typing import Final

import grpc.aio
import libvirt
import structlog

from handoff.agent.v1 import disk_pb2, disk_pb2_grpc
from handoff.agent.v1 import types_pb2 as types
from handoff_agent.inventory import Inventory
from handoff_agent.slots import Hypervisor
from handoff_common.errors import HandoffError

log = structlog.get_logger()

# A size comes from QEMU or from the image; storage that hangs must not hold the whole answer.
SIZE_TIMEOUT_S: Final = 5.0


class DiskService(disk_pb2_grpc.DiskServiceServicer):
    """Serves ListDisks."""

    def __init__(self, hypervisor: Hypervisor, inventory: Inventory) -> None:
        self._hypervisor = hypervisor
        self._inventory = inventory

    async def ListDisks(  # noqa: N802
        self,
        request: disk_pb2.ListDisksRequest,
        context: grpc.aio.ServicerContext[disk_pb2.ListDisksRequest, disk_pb2.ListDisksResponse],
    ) -> disk_pb2.ListDisksResponse:
        """The disks in the order of the XML. A size that can't be read is 0; NOT_FOUND for an unknown domain."""
        domain = await self._inventory.domain(request.domain_uuid)
        for disk in domain.disks:
            if disk.placement != types.DISK_PLACEMENT_EMPTY:
                await self._add_sizes(domain, disk)
        return disk_pb2.ListDisksResponse(disks=domain.disks)

    async def _add_sizes(self, domain: types.Domain, disk: types.Disk) -> None:
        target = disk.target

        def read(handle: libvirt.virDomain) -> tuple[int, int]:
            capacity, allocation, _physical = handle.blockInfo(target)
            return capacity, allocation

        slot = self._hypervisor.slot(domain.slot)
        try:
            disk.virtual_size_bytes, disk.allocated_bytes = await slot.on_domain(domain.uuid, read, SIZE_TIMEOUT_S)
        except HandoffError as error:
            log.warning("size of a disk not known", guest=domain.name, disk=target, reason=error.message)
