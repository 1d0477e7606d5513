"""What is looked at before a guest may leave this host."""

import libvirt

from handoff.agent.v1 import qemu_pb2 as pb
from handoff.agent.v1 import types_pb2 as types
from handoff_agent.disks.facts import disk_facts
from handoff_agent.inventory import Inventory
from handoff_agent.monitor import Monitor
from handoff_agent.movable import obstacles
from handoff_agent.shared_storage import shared_storage
from handoff_agent.slots import Hypervisor
from handoff_agent.survey import Survey
from handoff_common.errors import PreconditionError

_LIVE_FLAGS = libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_MIGRATABLE
_PERSISTENT_FLAGS = libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_INACTIVE
_ACTIVE = (types.DOMAIN_STATE_RUNNING, types.DOMAIN_STATE_PAUSED)


class Departures:
    """Reads guests and judges whether they can leave."""

    def __init__(
        self, hypervisor: Hypervisor, inventory: Inventory, survey: Survey, shared_paths: tuple[str, ...]
    ) -> None:
        self._hypervisor = hypervisor
        self._inventory = inventory
        self._survey = survey
        self._shared_paths = shared_paths

    async def read(self, uuid: str, *, local: bool = False) -> pb.SourceGuest:
        """The guest as the destination must know it, whatever its state. Raises as Hypervisor.find does, and QmpError.

        `local`: for another slot of this host, which needs to know nothing of its disks.
        """
        domain = await self._inventory.domain(uuid)
        slot = self._hypervisor.slot(domain.slot)

        def read_xml(handle: libvirt.virDomain) -> tuple[str, str, str]:
            persistent = handle.XMLDesc(_PERSISTENT_FLAGS) if handle.isPersistent() else ""
            return handle.XMLDesc(_LIVE_FLAGS), persistent, handle.XMLDesc(0)

        live_xml, persistent_xml, plain_xml = await slot.on_domain(uuid, read_xml)
        guest = pb.SourceGuest(
            domain=domain, live_xml=live_xml, persistent_xml=persistent_xml, autostart=domain.autostart
        )
        if not local and domain.state in _ACTIVE:
            guest.disks.extend(await disk_facts(domain, plain_xml, Monitor(slot, uuid)))
        return guest

    async def examine(self, uuid: str, *, local: bool = False) -> pb.SourceGuest:
        """The guest, if it can leave; `local`: for another slot of this host.

        Raises PreconditionError with every reason why it can't, and NotFoundError.
        """
        guest = await self.read(uuid, local=local)
        facts = await self._survey.source_facts(guest.domain)
        found = list(obstacles(guest.domain, facts, is_shared=shared_storage(self._shared_paths), local=local))
        if guest.domain.state in _ACTIVE:
            slot = self._hypervisor.slot(guest.domain.slot)
            job = await slot.on_domain(uuid, lambda domain: domain.jobInfo()[0])
            if job != libvirt.VIR_DOMAIN_JOB_NONE:
                found.append(
                    f"guest {guest.domain.name}: libvirt has a job on it (virsh domjobinfo); wait until it ends"
                )
        if found:
            raise PreconditionError("; ".join(found))
        guest.device_types.extend(await self._survey.device_types(guest.domain))
        if local:
            guest.cpr_obstacles.extend(await self._survey.cpr_obstacles(guest.domain))
        return guest
