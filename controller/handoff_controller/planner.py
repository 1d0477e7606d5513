"""Turns a request into a migration, or refuses it with a reason before anything is touched."""

import asyncio
import re
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from handoff.agent.v1.disk_pb2 import DiskMove, DiskStrategy
from handoff.agent.v1.qemu_pb2 import TransferMethod
from handoff.agent.v1.types_pb2 import Fence
from handoff.controller.v1.guests_pb2 import Guest
from handoff.controller.v1.migrations_pb2 import (
    CreateMigrationRequest,
    CreateUpgradeRequest,
    Migration,
    MigrationKind,
    MigrationOptions,
    Placement,
)
from handoff_common.errors import (
    DeadlineError,
    HandoffError,
    HostDownError,
    InvalidArgumentError,
    PreconditionError,
    UnavailableError,
)
from handoff_controller.agents import Agents, GrpcAgent
from handoff_controller.machine import State, enter
from handoff_controller.store import Reader
from handoff_controller.volumes import network_volumes

DEFAULT_DOWNTIME_LIMIT_MS = 300
DEFAULT_SWITCH_DEADLINE = timedelta(seconds=2)
DEFAULT_TIMEOUT = timedelta(minutes=30)
# What is sent of disks before the switch gets its time beside that, at this rate or the one that was asked for.
LEAST_USUAL_BYTES_PER_S = 32 << 20
# QEMU's own bounds: below a page or two a second nothing converges; it refuses a downtime above 2000 s.
LEAST_BANDWIDTH_BYTES_PER_S = 1 << 20
LONGEST_DOWNTIME_MS = 2_000_000
_COPIED = (DiskStrategy.DISK_STRATEGY_COPY, DiskStrategy.DISK_STRATEGY_CONVERT)
REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")


def with_defaults(options: MigrationOptions) -> MigrationOptions:
    """The options with every default filled in. Raises InvalidArgumentError for a value that can't be meant. Pure."""
    full = MigrationOptions()
    full.CopyFrom(options)
    full.downtime_limit_ms = options.downtime_limit_ms or DEFAULT_DOWNTIME_LIMIT_MS
    if not options.HasField("switch_deadline"):
        full.switch_deadline.FromTimedelta(
            max(DEFAULT_SWITCH_DEADLINE, timedelta(milliseconds=2 * full.downtime_limit_ms))
        )
    if not options.HasField("timeout"):
        full.timeout.FromTimedelta(DEFAULT_TIMEOUT)
    if full.downtime_limit_ms > LONGEST_DOWNTIME_MS:
        raise InvalidArgumentError(
            f"downtime limit {full.downtime_limit_ms} ms: QEMU takes {LONGEST_DOWNTIME_MS} at most"
        )
    if full.switch_deadline.ToTimedelta() <= timedelta(milliseconds=full.downtime_limit_ms):
        raise InvalidArgumentError(
            f"switch deadline {full.switch_deadline.ToTimedelta().total_seconds():g} s must be longer than the "
            f"downtime limit ({full.downtime_limit_ms} ms)"
        )
    if full.timeout.ToTimedelta() <= timedelta(0):
        raise InvalidArgumentError("timeout must be longer than 0 s")
    if 0 < full.bandwidth_bytes_per_s < LEAST_BANDWIDTH_BYTES_PER_S:
        raise InvalidArgumentError(
            f"bandwidth {full.bandwidth_bytes_per_s} bytes/s is less than 1 MiB/s: no guest would ever arrive"
        )
    return full


def time_for_disks(disks: Iterable[DiskMove], bandwidth_bytes_per_s: int) -> timedelta:
    """How long it may take to send what is sent before the switch. Pure."""
    copied = sum(move.bytes_to_send for move in disks if move.strategy in _COPIED)
    rate = min(bandwidth_bytes_per_s or LEAST_USUAL_BYTES_PER_S, LEAST_USUAL_BYTES_PER_S)
    return timedelta(seconds=copied // rate)


def new_migration_id(now: datetime) -> str:
    """An id that sorts by creation and can be said aloud."""
    return f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def check_names(request: CreateMigrationRequest | CreateUpgradeRequest) -> None:
    """Raises InvalidArgumentError for an id that can't be one, or without a guest. Pure."""
    if request.request_id and not REQUEST_ID.fullmatch(request.request_id):
        raise InvalidArgumentError("request_id: letters, digits and dashes, at most 64, not a dash first")
    if not request.guest:
        raise InvalidArgumentError("no guest given; `handoff guests` lists them")


def check_same(request: CreateMigrationRequest | CreateUpgradeRequest, known: Migration) -> None:
    """Raises InvalidArgumentError when a request_id is taken by something else than a try of the same. Pure."""
    is_same = request.guest in (known.guest_name, known.guest_uuid) or request.guest.lower() == known.guest_uuid
    is_upgrade = known.kind == MigrationKind.MIGRATION_KIND_UPGRADE
    if isinstance(request, CreateUpgradeRequest):
        is_same = is_same and is_upgrade
    else:
        is_same = is_same and not is_upgrade and request.destination_host == known.destination.host
    if not is_same:
        what = "the upgrade" if is_upgrade else "the migration"
        where = f"on {known.source.host}" if is_upgrade else f"to {known.destination.host}"
        raise InvalidArgumentError(
            f"request id {known.id} is taken by {what} of {known.guest_name} {where}; choose another"
        )


def check_free(guest: Guest) -> None:
    """Raises PreconditionError when the guest is being moved, or is not what its record says. Pure."""
    if guest.active_migration:
        raise PreconditionError(
            f"{guest.name} is being moved by migration {guest.active_migration}: wait for it "
            f"(`handoff watch {guest.active_migration}`) or cancel it"
        )
    if guest.conflicts:
        raise PreconditionError(
            f"{guest.name} belongs to {guest.owner.host}, but also runs on {', '.join(guest.conflicts)}: "
            "find out which copy is right and destroy the others first"
        )


class Planner:
    """Checks requests against the records and both hosts."""

    def __init__(self, reader: Reader, agents: Agents, fence: Fence) -> None:
        self._reader = reader
        self._agents = agents
        self._fence = fence

    async def plan(self, request: CreateMigrationRequest) -> Migration:
        """The migration, in PLANNED, not yet recorded. Raises what CreateMigration documents; changes nothing."""
        now = datetime.now(UTC)
        check_names(request)
        if not request.destination_host:
            raise InvalidArgumentError("no destination host given; `handoff hosts` lists them")
        options = with_defaults(request.options)
        destination = self._agents[request.destination_host]
        guest = await self._reader.guest(request.guest)
        self._check_free(guest, request.destination_host)
        source = self._agents[guest.owner.host]
        migration = Migration(
            id=request.request_id or new_migration_id(now),
            guest_uuid=guest.uuid,
            guest_name=guest.name,
            source=guest.owner,
            # A host's slots matter to hot upgrades only; a guest that comes from elsewhere starts in the first.
            destination=Placement(host=request.destination_host, slot="a"),
            options=options,
            kind=MigrationKind.MIGRATION_KIND_MOVE,
            method=TransferMethod.TRANSFER_METHOD_TCP,
        )
        migration.create_time.FromDatetime(now)
        try:
            await self._check_hosts(migration, source, destination)
        except HandoffError as error:
            raise explained(error, f"move {guest.name} to {migration.destination.host}") from error
        if not request.options.HasField("timeout"):
            longer = time_for_disks(migration.disks, options.bandwidth_bytes_per_s)
            migration.options.timeout.FromTimedelta(DEFAULT_TIMEOUT + longer)
        return enter(migration, State.PLANNED, at=now, term=self._fence.term)

    async def _check_hosts(self, migration: Migration, source: GrpcAgent, destination: GrpcAgent) -> None:
        """Asks both agents whether they could, as far as that can be told without doing it."""
        guest, host = await asyncio.gather(
            source.prepare_source(self._fence, migration.id, migration.guest_uuid, validate_only=True),
            destination.get_host(),
            return_exceptions=True,
        )
        # The destination first: a host that is down is the plainer reason.
        if isinstance(host, BaseException):
            raise host
        if isinstance(guest, BaseException):
            raise guest
        handoff = await destination.prepare_destination(
            self._fence,
            migration.id,
            guest,
            migration.destination.slot,
            validate_only=True,
            fast=migration.options.fast,
        )
        migration.volumes.extend(network_volumes(guest.domain.disks))
        migration.disks.extend(handoff.disks)

    def _check_free(self, guest: Guest, destination: str) -> None:
        if guest.owner.host == destination:
            raise InvalidArgumentError(f"{guest.name} is on {destination} already; name another host")
        check_free(guest)


def explained(problem: HandoffError, what: str) -> HandoffError:
    """The same error, saying what it is in the way of; a host that is down is told from a controller that is."""
    kind = HostDownError if isinstance(problem, UnavailableError | DeadlineError) else type(problem)
    return kind(f"can't {what}: {problem.message}")
