"""The host's domains as the API's messages, read from libvirt."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import libvirt

from handoff.agent.v1 import types_pb2 as types
from handoff_agent.emulators import Emulators
from handoff_agent.guests import GuestFacts, describe, domain_state
from handoff_agent.shared_storage import shared_storage
from handoff_agent.slots import Hypervisor, Slot

INVENTORY_TIMEOUT_S: Final = 10.0


class Inventory:
    """Reads domains from all slots. Knows nothing of handoffs: `migration_id` stays empty."""

    def __init__(self, hypervisor: Hypervisor, emulators: Emulators, shared_paths: tuple[str, ...]) -> None:
        self._hypervisor = hypervisor
        self._emulators = emulators
        self._shared_paths = shared_paths

    async def domains(self) -> list[types.Domain]:
        """All domains of all connected slots. Raises DeadlineError when a libvirtd does not answer."""
        found: list[types.Domain] = []
        for slot in self._hypervisor.slots:
            if slot.connected:
                readings = await slot.call(lambda connection: _read(connection.listAllDomains()), INVENTORY_TIMEOUT_S)
                found.extend(self._describe(slot, readings))
        return found

    async def domain(self, uuid: str) -> types.Domain:
        """One domain. Raises NotFoundError, UnavailableError or DeadlineError, as Hypervisor.find does."""
        slot, domain = await self._hypervisor.find(uuid)
        readings = await slot.call(lambda _: [_read_one(domain)], INVENTORY_TIMEOUT_S)
        return self._describe(slot, readings)[0]

    def _describe(self, slot: Slot, readings: Sequence[tuple[str, GuestFacts]]) -> list[types.Domain]:
        is_shared = shared_storage(self._shared_paths)
        releases = self._emulators.releases
        return [
            describe(xml, replace(facts, slot=slot.name), is_shared=is_shared, releases=releases)
            for xml, facts in readings
        ]


def _read(domains: Sequence[libvirt.virDomain]) -> list[tuple[str, GuestFacts]]:
    readings = []
    for domain in domains:
        try:
            readings.append(_read_one(domain))
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:  # it went away while we read the others
                raise
    return readings


def _read_one(domain: libvirt.virDomain) -> tuple[str, GuestFacts]:
    xml: str = domain.XMLDesc(0)
    state, _reason = domain.state()
    persistent = bool(domain.isPersistent())
    autostart = persistent and bool(domain.autostart())
    return xml, GuestFacts("", domain_state(state), persistent, autostart)
