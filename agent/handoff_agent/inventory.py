"""The host's domains as the API's messages, read from libvirt."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import libvirt

from handoff.agent.v1 import types_pb2 as types
from handoff_agent.emulators import Emulators
from handoff_agent.guests import GuestFacts, describe, domain_state
from handoff_agent.running import Process, RunningReleases
from handoff_agent.shared_storage import shared_storage
from handoff_agent.slots import Hypervisor, Slot

INVENTORY_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Reading:
    """A domain as libvirt tells it. `libvirt_id` is -1 when it is not active."""

    xml: str
    facts: GuestFacts
    uuid: str
    libvirt_id: int


class Inventory:
    """Reads domains from all slots. Knows nothing of handoffs: `migration_id` stays empty."""

    def __init__(self, hypervisor: Hypervisor, emulators: Emulators, shared_paths: tuple[str, ...]) -> None:
        self._hypervisor = hypervisor
        self._emulators = emulators
        self._shared_paths = shared_paths
        self._running = RunningReleases()

    async def close(self) -> None:
        """Ends what goes on in the background."""
        await self._running.close()

    async def domains(self) -> list[types.Domain]:
        """All domains of all connected slots. Raises DeadlineError when a libvirtd does not answer."""
        found: list[types.Domain] = []
        for slot in self._hypervisor.slots:
            if slot.connected:
                readings = await slot.call(lambda connection: _read(connection.listAllDomains()), INVENTORY_TIMEOUT_S)
                active = {_process(slot, reading) for reading in readings if reading.libvirt_id >= 0}
                self._running.keep(slot.name, active)
                found.extend(await self._describe(slot, readings))
        return found

    async def domain(self, uuid: str) -> types.Domain:
        """One domain. Raises NotFoundError, UnavailableError or DeadlineError, as Hypervisor.find does."""
        slot = await self._hypervisor.find(uuid)
        reading = await slot.on_domain(uuid, _read_one, INVENTORY_TIMEOUT_S)
        return (await self._describe(slot, [reading]))[0]

    async def _describe(self, slot: Slot, readings: Sequence[_Reading]) -> list[types.Domain]:
        is_shared = shared_storage(self._shared_paths)
        builds = self._emulators.builds
        # One that is paused may be in a handoff, where its monitor has other things to do.
        running = [_process(slot, each) for each in readings if each.facts.state == types.DOMAIN_STATE_RUNNING]
        await self._running.ask(slot, running)
        found = []
        for reading in readings:
            release = self._running.of(_process(slot, reading))
            facts = replace(reading.facts, slot=slot.name, qemu_release=release)
            found.append(describe(reading.xml, facts, is_shared=is_shared, builds=builds))
        return found


def _process(slot: Slot, reading: _Reading) -> Process:
    return Process(slot.name, reading.uuid, reading.libvirt_id)


def _read(domains: Sequence[libvirt.virDomain]) -> list[_Reading]:
    readings = []
    for domain in domains:
        try:
            readings.append(_read_one(domain))
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:  # it went away while we read the others
                raise
    return readings


def _read_one(domain: libvirt.virDomain) -> _Reading:
    xml: str = domain.XMLDesc(0)
    state, _reason = domain.state()
    persistent = bool(domain.isPersistent())
    autostart = persistent and bool(domain.autostart())
    facts = GuestFacts("", domain_state(state), persistent, autostart)
    return _Reading(xml, facts, domain.UUIDString(), domain.ID())
