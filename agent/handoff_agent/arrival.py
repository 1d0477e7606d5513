"""What is looked at before a guest may come to this host, and the XML that it comes with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from handoff.agent.v1 import disk_pb2
from handoff.agent.v1 import qemu_pb2 as pb
from handoff_agent.builds import has_multifd
from handoff_agent.disks.plans import DiskPlans
from handoff_agent.disks.space import Promise
from handoff_agent.domain_xml import XmlChanges, destination_xml, persistent_xml
from handoff_agent.emulators import Emulators
from handoff_agent.movable import destination_obstacles, refusal
from handoff_agent.survey import LOCAL_METHODS, Survey
from handoff_common.errors import InvalidArgumentError, PreconditionError

DEFAULT_SLOT: Final = "a"


@dataclass(frozen=True, slots=True)
class Arrival:
    """A guest that can come."""

    create_xml: str
    persistent_xml: str
    """Empty for a transient guest."""
    cpr_obstacles: tuple[str, ...] = ()
    """Why its memory can't be passed on to the build that it gets."""
    multifd: bool = False
    """Both QEMUs can copy over several connections."""
    disks: tuple[disk_pb2.DiskMove, ...] = ()
    """What is done with its disks; the XML does not have that yet."""


class Arrivals:
    """Judges guests from elsewhere and makes their XML ours."""

    def __init__(self, survey: Survey, emulators: Emulators, display_address: str, disks: DiskPlans) -> None:
        """`display_address`: where displays listen that listened on one address of the source."""
        self._survey = survey
        self._emulators = emulators
        self._display_address = display_address
        self._disks = disks

    async def examine(
        self,
        guest: pb.SourceGuest,
        slot: str,
        method: pb.TransferMethod.ValueType = pb.TRANSFER_METHOD_TCP,
        emulator: str = "",
        cpr_socket: str = "",
        *,
        fast: bool = False,
        promises: Sequence[Promise] = (),
    ) -> Arrival:
        """The guest's XML for here. `emulator`: name of the build that it shall get; `fast`: disks are pulled.

        `promises`: the space of other guests' disks that are on their way.

        Raises PreconditionError or ExhaustedError with every reason why it can't come, and as Survey.host_facts does.
        """
        domain = guest.domain
        if not guest.live_xml or not domain.uuid:
            raise InvalidArgumentError("guest: its live XML and UUID are needed, as PrepareSource returned them")
        local = method in LOCAL_METHODS
        if local and slot == domain.slot:
            raise InvalidArgumentError(f"guest {domain.name} is in slot {slot} already")
        facts = replace(
            await self._survey.host_facts(domain, slot, method, emulator), device_types=frozenset(guest.device_types)
        )
        refused = refusal(destination_obstacles(domain, facts))
        if refused is not None:
            raise refused
        moves = () if local else await self._disks.plan(domain.name, guest.disks, fast=fast, promises=promises)
        build = (
            next((build for build in self._emulators.builds if build.name == emulator), None)
            if emulator
            else self._emulators.choose(release=domain.qemu_release, path=domain.emulator)
        )
        if build is None:
            raise PreconditionError(f"no QEMU {domain.qemu_release} on host {facts.name} for guest {domain.name}")
        no_cpr = () if build.cpr else (f"QEMU build {build.name} ({build.release}) can't take memory passed on",)
        if method == pb.TRANSFER_METHOD_CPR and no_cpr:
            raise PreconditionError(f"guest {domain.name}: {no_cpr[0]}")
        changes = XmlChanges(
            emulator=build.path,
            source_emulator=domain.emulator,
            graphics_address=None if local else self._display_address,
            upgrade=local,
            shares_auxiliary_ram=build.cpr if local else None,
            cpr_socket=cpr_socket if method == pb.TRANSFER_METHOD_CPR else "",
        )
        persistent = persistent_xml(guest.persistent_xml, changes) if guest.persistent_xml else ""
        multifd = all(has_multifd(release) for release in (domain.qemu_release, build.release))
        return Arrival(destination_xml(guest.live_xml, changes), persistent, no_cpr, multifd, moves)
