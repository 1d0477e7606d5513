"""Turns a request for another QEMU into a migration between the two slots of the guest's host, or refuses it."""

from collections.abc import Sequence
from datetime import UTC, datetime

from handoff.agent.v1.host_pb2 import Emulator, Host
from handoff.agent.v1.qemu_pb2 import SourceGuest, TransferMethod
from handoff.agent.v1.types_pb2 import Domain, Fence
from handoff.controller.v1.guests_pb2 import Guest
from handoff.controller.v1.migrations_pb2 import CreateUpgradeRequest, Migration, MigrationKind, Placement
from handoff_common.errors import HandoffError, InvalidArgumentError, NotFoundError, PreconditionError
from handoff_controller.agents import Agents, GrpcAgent
from handoff_controller.machine import State, enter
from handoff_controller.planner import check_free, check_names, explained, new_migration_id, with_defaults
from handoff_controller.store import Reader

CPR = TransferMethod.TRANSFER_METHOD_CPR
COPY = TransferMethod.TRANSFER_METHOD_UNIX


def choose_build(host: Host, release: str) -> Emulator:
    """The build that is meant by its name, by a release that only one has, or by nothing: the preferred one. Pure.

    Raises NotFoundError, or InvalidArgumentError when several builds are of that release.
    """
    if not host.emulators:
        raise NotFoundError(f"host {host.name} has no QEMU build; list them under emulators in its agent's file")
    if not release:
        return host.emulators[0]
    found = [build for build in host.emulators if build.name == release]
    found = found or [build for build in host.emulators if build.release == release]
    if not found:
        known = ", ".join(f"{build.name} ({build.release})" for build in host.emulators)
        raise NotFoundError(f"host {host.name} has no QEMU build {release}; it has {known}")
    if len(found) > 1:
        names = ", ".join(build.name for build in found)
        raise InvalidArgumentError(f"host {host.name} has several builds of QEMU {release}: name one of {names}")
    return found[0]


def check_new(domain: Domain, build: Emulator) -> None:
    """Raises InvalidArgumentError when the guest runs under that very build. Pure."""
    if domain.emulator_name == build.name:
        raise InvalidArgumentError(f"{domain.name} runs under QEMU build {build.name} ({build.release}) already")


def other_slot(host: Host, slot: str) -> str:
    """The slot to go to. Raises PreconditionError when there is none, or it has no libvirtd. Pure."""
    other = next((each for each in host.slots if each.name != slot), None)
    if other is None:
        raise PreconditionError(
            f"host {host.name} has no slot but {slot}; an upgrade needs a second libvirtd: set it up, and name it in "
            "the agent's file"
        )
    if not other.connected:
        raise PreconditionError(f"slot {other.name} of host {host.name} has no libvirtd; start it first")
    return other.name


def choose_method(obstacles: Sequence[str], build: Emulator) -> tuple["TransferMethod.ValueType", str]:
    """How the memory gets to the new QEMU, and why so. Pure."""
    found = list(obstacles)
    if not build.cpr:
        found.append(f"QEMU build {build.name} ({build.release}) can't take memory passed on")
    if not found:
        return CPR, "cpr: both QEMUs can pass memory on, and the guest's is shareable, so none is copied"
    return COPY, f"copy: {'; '.join(found)}"


class UpgradePlanner:
    """Checks requests against the records and the guest's host."""

    def __init__(self, reader: Reader, agents: Agents, fence: Fence) -> None:
        self._reader = reader
        self._agents = agents
        self._fence = fence

    async def plan(self, request: CreateUpgradeRequest) -> Migration:
        """The migration, in PLANNED, not yet recorded. Raises what CreateUpgrade documents; changes nothing."""
        now = datetime.now(UTC)
        check_names(request)
        options = with_defaults(request.options)
        guest = await self._reader.guest(request.guest)
        check_free(guest)
        agent = self._agents[guest.owner.host]
        migration = Migration(
            id=request.request_id or new_migration_id(now),
            guest_uuid=guest.uuid,
            guest_name=guest.name,
            source=guest.owner,
            options=options,
            kind=MigrationKind.MIGRATION_KIND_UPGRADE,
        )
        migration.create_time.FromDatetime(now)
        try:
            await self._decide(migration, guest, agent, request.release)
        except HandoffError as error:
            raise explained(error, f"upgrade {guest.name} on {guest.owner.host}") from error
        return enter(migration, State.PLANNED, at=now, term=self._fence.term)

    async def _decide(self, migration: Migration, guest: Guest, agent: GrpcAgent, release: str) -> None:
        host = await agent.get_host()
        build = choose_build(host, release)
        slot = other_slot(host, guest.owner.slot)
        source = await agent.prepare_source(self._fence, migration.id, guest.uuid, validate_only=True, local=True)
        check_new(source.domain, build)
        migration.destination.CopyFrom(Placement(host=host.name, slot=slot))
        migration.release = build.name
        migration.method, migration.plan = choose_method(source.cpr_obstacles, build)
        await self._check(migration, source, agent)

    async def _check(self, migration: Migration, source: SourceGuest, agent: GrpcAgent) -> None:
        await agent.prepare_destination(
            self._fence,
            migration.id,
            source,
            migration.destination.slot,
            validate_only=True,
            method=migration.method,
            emulator=migration.release,
        )
