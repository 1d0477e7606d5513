"""The records in etcd, as protobuf JSON below /handoff/v1/.

    vms/<uuid>        Guest: who owns it, its generation, its active migration
    migrations/<id>   Migration
    progress/<id>     TransferProgress of a copy under way; goes with the leader's lease
    hosts/<name>      Host
    rollouts/<id>     Rollout
    leader/           the election

Reading needs no leadership. Each write is one transaction that compares the leader's key and the versions of what it
changes, so a replaced leader, or a second change from the same state, changes nothing.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

import structlog
from google.protobuf.json_format import MessageToJson, Parse
from google.protobuf.message import Message

from handoff.agent.v1.qemu_pb2 import TransferProgress
from handoff.controller.v1.guests_pb2 import Guest
from handoff.controller.v1.hosts_pb2 import Host
from handoff.controller.v1.migrations_pb2 import Migration, Placement
from handoff.controller.v1.rollouts_pb2 import Rollout, RolloutState
from handoff_common.errors import (
    ConflictError,
    DeadlineError,
    NotFoundError,
    PreconditionError,
    StaleTermError,
    UnavailableError,
)
from handoff_controller.etcd.client import EtcdClient
from handoff_controller.etcd.election import Leadership
from handoff_controller.etcd.txn import Compare, KeyValue, Op, PutOp, delete, missing, modified_at, put, read
from handoff_controller.etcd.watch import follow
from handoff_controller.machine import FINAL, State, state_of

log = structlog.get_logger()

ROOT = "/handoff/v1"
GUESTS = f"{ROOT}/vms/"
MIGRATIONS = f"{ROOT}/migrations/"
PROGRESS = f"{ROOT}/progress/"
HOSTS = f"{ROOT}/hosts/"
ROLLOUTS = f"{ROOT}/rollouts/"

PROGRESS_DEADLINE_S = 1.0
WRITE_DEADLINE_S = 5.0

Record = TypeVar("Record", Guest, Migration, Host, Rollout, TransferProgress)


def encode(message: Message) -> bytes:
    """A record as etcd keeps it: JSON that reads well, without what is not part of the record."""
    kept = type(message)()
    kept.CopyFrom(message)
    if isinstance(kept, Migration | Guest | Rollout):
        kept.revision = 0
    if isinstance(kept, Migration):
        kept.ClearField("progress")
    if isinstance(kept, Guest):
        kept.ClearField("domain")
        kept.needs_decision = ""
    return MessageToJson(kept, preserving_proto_field_name=True, indent=None).encode()


def decode(value: KeyValue, kind: type[Record]) -> Record:
    """Reads a record; fields that a newer release wrote are left out."""
    record = Parse(value.value, kind(), ignore_unknown_fields=True)
    if isinstance(record, Migration | Guest | Rollout):
        record.revision = value.mod_revision
    return record


def guest_after(guest: Guest, migration: Migration) -> Guest:
    """What a migration's new state means for its guest: who owns it, and whether it is free again. Pure.

    From the commit on the destination owns it; with the abort, also one that follows a fenced commit, the source does.
    """
    changed = Guest()
    changed.CopyFrom(guest)
    state = state_of(migration)
    owner: Placement | None = None
    if state is State.COMMITTED:
        owner = migration.destination
    elif state in (State.ABORTING, State.ABORTED):
        owner = migration.source
    if owner is not None and owner != changed.owner:
        changed.owner.CopyFrom(owner)
        changed.generation += 1
    if state in FINAL and changed.active_migration == migration.id:
        changed.active_migration = ""
        changed.ClearField("loss")
        if migration.HasField("loss"):
            changed.loss.CopyFrom(migration.loss)
    return changed


class Reader:
    """Reads the records. Raises UnavailableError or DeadlineError when etcd does not answer."""

    def __init__(self, client: EtcdClient) -> None:
        self._client = client

    async def guest(self, name_or_uuid: str) -> Guest:
        """The guest. Raises NotFoundError, or PreconditionError when several have that name."""
        value = await self._client.get(GUESTS + name_or_uuid.lower())
        if value is not None:
            return decode(value, Guest)
        found = [guest for guest in await self.guests() if guest.name == name_or_uuid]
        if not found:
            raise NotFoundError(f"no guest {name_or_uuid!r}; `handoff guests` lists them")
        if len(found) > 1:
            where = ", ".join(f"{guest.uuid} on {guest.owner.host}" for guest in found)
            raise PreconditionError(f"{len(found)} guests are named {name_or_uuid!r}: say which by UUID ({where})")
        return found[0]

    async def guests(self) -> tuple[Guest, ...]:
        """All guests, by name."""
        _, values = await self._client.list(GUESTS)
        return tuple(sorted((decode(value, Guest) for value in values), key=lambda guest: (guest.name, guest.uuid)))

    async def hosts(self) -> tuple[Host, ...]:
        """All hosts that a leader has looked at, by name."""
        _, values = await self._client.list(HOSTS)
        return tuple(decode(value, Host) for value in values)

    async def migration(self, beginning: str) -> Migration:
        """The migration with this id, or the only one whose id begins so. Raises NotFoundError or PreconditionError."""
        if not beginning:
            raise NotFoundError("no migration id given; `handoff list` shows them")
        _, values = await self._client.list(MIGRATIONS + beginning)
        if not values:
            raise NotFoundError(f"no migration {beginning!r}; `handoff list` shows them")
        exact = [value for value in values if value.key == MIGRATIONS + beginning]
        if not exact and len(values) > 1:
            raise PreconditionError(f"{len(values)} migrations begin with {beginning!r}: give more of the id")
        migration = decode((exact or list(values))[0], Migration)
        await self._add_progress(migration)
        return migration

    async def find_migration(self, migration_id: str) -> Migration | None:
        """The record with exactly this id, without its progress."""
        value = await self._client.get(MIGRATIONS + migration_id)
        return None if value is None else decode(value, Migration)

    async def migrations(self) -> tuple[Migration, ...]:
        """All migrations, oldest first."""
        _, values = await self._client.list(MIGRATIONS)
        return tuple(decode(value, Migration) for value in values)

    async def rollouts(self) -> tuple[Rollout, ...]:
        """All rollouts, oldest first."""
        _, values = await self._client.list(ROLLOUTS)
        return tuple(decode(value, Rollout) for value in values)

    async def rollout(self, beginning: str) -> Rollout:
        """The rollout with this id, or the only one whose id begins so. Raises NotFoundError or PreconditionError."""
        found = [one for one in await self.rollouts() if beginning and one.id.startswith(beginning)]
        if not found:
            raise NotFoundError(f"no rollout {beginning!r}; `handoff rollouts` lists them")
        exact = [one for one in found if one.id == beginning]
        if not exact and len(found) > 1:
            raise PreconditionError(f"{len(found)} rollouts begin with {beginning!r}: give more of the id")
        return (exact or found)[0]

    async def find_rollout(self, rollout_id: str) -> Rollout | None:
        """The record with exactly this id."""
        value = await self._client.get(ROLLOUTS + rollout_id)
        return None if value is None else decode(value, Rollout)

    async def watch_rollout(self, beginning: str) -> AsyncGenerator[Rollout, None]:
        """The rollout as it is now, then at each change, until it is final."""
        key = ROLLOUTS + (await self.rollout(beginning)).id
        async with aclosing(follow(self._client, key)) as views:
            async for view in views:
                if key not in view:
                    continue
                rollout = decode(view[key], Rollout)
                yield rollout
                if rollout.state not in (RolloutState.ROLLOUT_STATE_RUNNING, RolloutState.ROLLOUT_STATE_STOPPING):
                    return

    async def watch_migration(self, migration_id: str) -> AsyncGenerator[Migration, None]:
        """The migration as it is now, then at each change of its record or progress, until it is final."""
        migration = await self.migration(migration_id)
        yield migration
        if state_of(migration) in FINAL:
            return
        async with aclosing(self._changes(migration.id)) as changes:
            async for value in changes:
                before = Migration()
                before.CopyFrom(migration)
                if value.key.startswith(PROGRESS):
                    migration.progress.CopyFrom(decode(value, TransferProgress))
                else:
                    changed = decode(value, Migration)
                    changed.progress.CopyFrom(migration.progress)
                    migration = changed
                if migration != before:
                    yield migration
                if state_of(migration) in FINAL:
                    return

    async def _changes(self, migration_id: str) -> AsyncGenerator[KeyValue, None]:
        """The record and the progress of one migration, as they are now and whenever one of them changes."""
        queue: asyncio.Queue[KeyValue] = asyncio.Queue()

        async def pump(key: str) -> None:
            async with aclosing(follow(self._client, key)) as views:
                async for view in views:
                    if key in view:
                        queue.put_nowait(view[key])

        pumps = [asyncio.create_task(pump(key + migration_id)) for key in (MIGRATIONS, PROGRESS)]
        value = asyncio.create_task(queue.get())
        try:
            while True:
                await asyncio.wait({value, *pumps}, return_when=asyncio.FIRST_COMPLETED)
                for ended in pumps:
                    if ended.done():
                        ended.result()
                yield await value
                value = asyncio.create_task(queue.get())
        finally:
            for task in (value, *pumps):
                task.cancel()
            await asyncio.wait({value, *pumps})

    async def _add_progress(self, migration: Migration) -> None:
        if state_of(migration) in FINAL:
            return
        value = await self._client.get(PROGRESS + migration.id)
        if value is not None:
            migration.progress.CopyFrom(decode(value, TransferProgress))


class Store(Reader):
    """Writes the records, for one term of leadership.

    A write raises StaleTermError when we don't lead any more, ConflictError when a record is not the one that was
    changed, UnavailableError or DeadlineError when etcd does not answer. After a DeadlineError the write may be there,
    or may come yet: read again; whatever is written next from the old version takes its place.
    """

    def __init__(self, client: EtcdClient, leadership: Leadership) -> None:
        super().__init__(client)
        self._leadership = leadership
        # Saves the read of the guest while it is paused. A wrong entry fails its compare, also when nothing would
        # change in it, and is read again.
        self._guests: dict[str, Guest] = {}

    async def create(self, migration: Migration) -> Migration:
        """Records a new migration and gives it its guest, if nothing else has it. Raises ConflictError otherwise."""
        guest = await self.guest(migration.guest_uuid)
        if guest.active_migration or guest.owner != migration.source:
            raise ConflictError(f"{guest.name} has just been taken by another migration; look at it and try again")
        guest.active_migration = migration.id
        created = Migration()
        created.CopyFrom(migration)
        created.revision = await self._write(
            [missing(MIGRATIONS + migration.id), modified_at(GUESTS + guest.uuid, guest.revision)],
            [put(MIGRATIONS + migration.id, encode(migration)), put(GUESTS + guest.uuid, encode(guest))],
        )
        return created

    async def save(self, migration: Migration) -> Migration:
        """Writes a migration's changed record, and what it means for its guest (`guest_after`), together."""
        guest_key, migration_key = GUESTS + migration.guest_uuid, MIGRATIONS + migration.id
        while True:
            guest = self._guests.pop(migration.guest_uuid, None) or await self.guest(migration.guest_uuid)
            changed = guest_after(guest, migration)
            compares = [modified_at(migration_key, migration.revision), modified_at(guest_key, guest.revision)]
            ops: list[Op] = [put(migration_key, encode(migration))]
            if changed != guest:
                ops.append(put(guest_key, encode(changed)))
            if state_of(migration) in FINAL:
                ops.append(delete(PROGRESS + migration.id))
            try:
                revision = await self._write(compares, ops)
            except ConflictError:
                if not await self._is_at(migration_key, migration.revision):
                    raise
                continue
            saved = Migration()
            saved.CopyFrom(migration)
            saved.revision = revision
            if changed != guest:
                changed.revision = revision
            if state_of(migration) not in FINAL:
                self._guests[migration.guest_uuid] = changed
            return saved

    async def put_progress(self, migration_id: str, progress: TransferProgress) -> None:
        """Publishes a reading of the copy; what can't be written within PROGRESS_DEADLINE_S is left out."""
        try:
            await self._client.txn(
                [self._leadership.guard()],
                [put(PROGRESS + migration_id, encode(progress), self._leadership.lease_id)],
                deadline_s=PROGRESS_DEADLINE_S,
            )
        except (UnavailableError, DeadlineError):
            log.debug("progress not published", migration=migration_id)

    async def put_host(self, host: Host) -> None:
        """Writes what we know of a host."""
        await self._write([], [put(HOSTS + host.name, encode(host))])

    async def put_guest(self, guest: Guest) -> None:
        """Writes a guest outside of a migration; `revision` 0 for a new one. Raises ConflictError when it changed."""
        key = GUESTS + guest.uuid
        unchanged = modified_at(key, guest.revision) if guest.revision else missing(key)
        await self._write([unchanged], [put(key, encode(guest))])

    async def put_rollout(self, rollout: Rollout) -> Rollout:
        """Writes a rollout; `revision` 0 for a new one. Raises ConflictError when its record changed."""
        key = ROLLOUTS + rollout.id
        unchanged = modified_at(key, rollout.revision) if rollout.revision else missing(key)
        saved = Rollout()
        saved.CopyFrom(rollout)
        saved.revision = await self._write([unchanged], [put(key, encode(rollout))])
        return saved

    async def forget(self, migration: Migration) -> None:
        """Deletes the record of a migration that has ended. Raises ConflictError when it changed."""
        key = MIGRATIONS + migration.id
        await self._write([modified_at(key, migration.revision)], [delete(key), delete(PROGRESS + migration.id)])

    async def delete_guest(self, guest: Guest) -> None:
        """Forgets a guest that is gone. Raises ConflictError when its record changed."""
        key = GUESTS + guest.uuid
        await self._write([modified_at(key, guest.revision)], [delete(key)])

    async def _is_at(self, key: str, revision: int) -> bool:
        value = await self._client.get(key)
        return value is not None and value.mod_revision == revision

    async def _write(self, compares: Sequence[Compare], ops: Sequence[Op]) -> int:
        """Applies the operations under the leader's guard and returns their revision."""
        guard = self._leadership.guard()
        puts = [op for op in ops if isinstance(op, PutOp)]
        result = await self._client.txn(
            [guard, *compares], ops, [read(guard.key), *(read(op.key) for op in puts)], deadline_s=WRITE_DEADLINE_S
        )
        if result.succeeded:
            return result.revision
        leader, *found = result.reads
        if result.uncertain and puts and all(_is(value, op) for value, op in zip(found, puts, strict=True)):
            return max(value.mod_revision for value in found if value is not None)
        if leader is None or leader.create_revision != guard.revision:
            raise StaleTermError(f"term {guard.revision} has ended; another replica leads")
        raise ConflictError(f"{', '.join(op.key for op in puts)}: changed by another writer; read again")


def _is(value: KeyValue | None, op: PutOp) -> bool:
    """Whether an unanswered try of ours wrote this value."""
    return value is not None and value.value == op.value
