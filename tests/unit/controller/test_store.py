"""The store against a real etcd."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

import pytest
from etcd_cluster import EtcdCluster, until
from leading import Lead
from records import EPOCH, UUID, guest, migration

from handoff.agent.v1.qemu_pb2 import TransferProgress
from handoff.controller.v1.migrations_pb2 import Migration
from handoff_common.errors import ConflictError, DeadlineError, NotFoundError, PreconditionError, StaleTermError
from handoff_controller.etcd.client import EtcdClient
from handoff_controller.etcd.txn import Compare, Op, ReadOp, TxnResult
from handoff_controller.machine import State, enter, state_of
from handoff_controller.store import Store


class Unheard(EtcdClient):
    """Every transaction's answer is lost once; it is sent again, as EtcdClient does, or given up."""

    gives_up = False

    async def txn(
        self,
        compares: Sequence[Compare],
        success_ops: Sequence[Op],
        failure_ops: Sequence[ReadOp] = (),
        *,
        deadline_s: float = 10,
    ) -> TxnResult:
        first = await super().txn(compares, success_ops, failure_ops)
        if self.gives_up:
            raise DeadlineError("no answer")
        again = await super().txn(compares, success_ops, failure_ops)
        assert not (first.succeeded and again.succeeded)
        return TxnResult(again.succeeded, again.revision, again.reads, uncertain=True)


async def begun(store: Store, migration_id: str = "m1") -> Migration:
    await store.put_guest(guest())
    return await store.create(migration(migration_id))


async def through(store: Store, record: Migration, *states: State) -> Migration:
    for state in states:
        record = await store.save(enter(record, state, at=EPOCH, term=1, reason=f"to {state.name}"))
    return record


TO_THE_COMMIT = (State.PREPARING, State.COPYING, State.SWITCHING, State.COMMITTED)


async def test_a_guest_is_taken_by_one_migration(store: Store) -> None:
    first = await begun(store)

    with pytest.raises(ConflictError, match="another migration"):
        await store.create(migration("m2"))

    assert (await store.guest(UUID)).active_migration == "m1"
    assert await store.find_migration("m1") == first
    assert await store.find_migration("m2") is None


async def test_two_creates_at_once_leave_one(store: Store) -> None:
    await store.put_guest(guest())

    outcomes = await asyncio.gather(
        *(store.create(migration(f"m{number}")) for number in range(4)), return_exceptions=True
    )

    (created,) = (outcome for outcome in outcomes if isinstance(outcome, Migration))
    assert sum(isinstance(outcome, ConflictError) for outcome in outcomes) == 3
    assert [one.id for one in await store.migrations()] == [created.id]
    assert (await store.guest(UUID)).active_migration == created.id


async def test_a_guest_that_has_moved_is_not_taken(store: Store) -> None:
    await store.put_guest(guest("h3"))

    with pytest.raises(ConflictError):
        await store.create(migration())


async def test_only_one_of_commit_and_abort_follows_the_switch(store: Store) -> None:
    switching = await through(store, await begun(store), *TO_THE_COMMIT[:-1])
    await through(store, switching, State.COMMITTED)

    with pytest.raises(ConflictError):
        await through(store, switching, State.ABORTING)

    recorded = await store.find_migration("m1")
    assert recorded is not None
    assert state_of(recorded) is State.COMMITTED


async def test_the_guest_moves_with_the_commit_and_is_free_at_the_end(store: Store) -> None:
    switching = await through(store, await begun(store), *TO_THE_COMMIT[:-1])
    assert ((await store.guest(UUID)).owner.host, (await store.guest(UUID)).generation) == ("h1", 1)

    committed = await through(store, switching, State.COMMITTED)
    moved = await store.guest(UUID)
    assert (moved.owner.host, moved.generation, moved.active_migration) == ("h2", 2, "m1")
    assert moved.revision == committed.revision

    await through(store, committed, State.FINISHING, State.DONE)
    assert (await store.guest(UUID)).active_migration == ""


async def test_a_fenced_commit_gives_the_guest_back(store: Store) -> None:
    committed = await through(store, await begun(store), *TO_THE_COMMIT)

    await through(store, committed, State.ABORTING, State.ABORTED)

    back = await store.guest(UUID)
    assert (back.owner.host, back.generation, back.active_migration) == ("h1", 3, "")


async def test_a_second_migration_of_a_guest_that_is_aborted_frees_it(store: Store) -> None:
    await through(store, await begun(store), *TO_THE_COMMIT, State.FINISHING, State.DONE)

    again = await store.create(migration("m2", "h2", "h1"))
    await through(store, again, State.ABORTED)

    assert (await store.guest(UUID)).active_migration == ""


async def test_a_guest_changed_meanwhile_is_read_again(store: Store) -> None:
    preparing = await through(store, await begun(store), State.PREPARING)
    changed = await store.guest(UUID)
    changed.name = "www"
    await store.put_guest(changed)

    await through(store, preparing, State.COPYING, State.SWITCHING, State.COMMITTED)

    moved = await store.guest(UUID)
    assert (moved.name, moved.owner.host) == ("www", "h2")


async def test_a_replaced_leader_writes_nothing(client: EtcdClient, lead: Lead) -> None:
    old = Store(client, await lead())
    planned = await begun(old)
    new = Store(client, await lead())

    for write in (
        through(old, planned, State.PREPARING),
        old.put_guest(guest(uuid="other")),
        old.create(migration("m2", uuid=UUID)),
    ):
        with pytest.raises((StaleTermError, ConflictError)):
            await write
    await old.put_progress("m1", TransferProgress(elapsed_ms=1))

    recorded = await new.migration("m1")
    assert (state_of(recorded), recorded.progress.elapsed_ms) == (State.PLANNED, 0)
    await through(new, recorded, State.PREPARING)
    with pytest.raises(StaleTermError):
        await through(old, planned, State.PREPARING)


async def test_a_leader_that_knows_it_is_over_does_not_even_ask(client: EtcdClient, lead: Lead) -> None:
    leadership = await lead()
    store = Store(client, leadership)
    planned = await begun(store)
    leadership.lost.set()

    with pytest.raises(StaleTermError, match="has ended"):
        await through(store, planned, State.PREPARING)


async def test_a_write_that_was_applied_unseen_is_recognised(cluster: EtcdCluster, lead: Lead) -> None:
    async with Unheard(cluster.endpoints) as client:
        store = Store(client, await lead())

        committed = await through(store, await begun(store), *TO_THE_COMMIT)

        assert committed.revision == (await store.guest(UUID)).revision
        await through(store, committed, State.FINISHING, State.DONE)
        assert (await store.guest(UUID)).active_migration == ""


async def test_a_write_that_was_never_answered_is_not_taken_for_failed(cluster: EtcdCluster, lead: Lead) -> None:
    async with Unheard(cluster.endpoints) as client:
        store = Store(client, await lead())
        switching = await through(store, await begun(store), *TO_THE_COMMIT[:-1])

        client.gives_up = True
        with pytest.raises(DeadlineError):
            await through(store, switching, State.COMMITTED)
        client.gives_up = False
        with pytest.raises(ConflictError):
            await through(store, switching, State.ABORTING)

        recorded = await store.find_migration("m1")
        assert recorded is not None
        assert state_of(recorded) is State.COMMITTED


async def test_a_watch_merges_progress_and_ends_with_the_migration(store: Store) -> None:
    planned = await begun(store)
    seen: list[tuple[State, int]] = []
    first = asyncio.Event()

    async def watch() -> None:
        async with aclosing(store.watch_migration("m1")) as views:
            async for view in views:
                seen.append((state_of(view), view.progress.elapsed_ms))
                first.set()

    watching = asyncio.create_task(watch())
    await first.wait()
    copying = await through(store, planned, State.PREPARING, State.COPYING)
    await store.put_progress("m1", TransferProgress(elapsed_ms=5))
    await until(lambda: (State.COPYING, 5) in seen, 5, 0.01)
    assert (await store.migration("m1")).progress.elapsed_ms == 5
    await through(store, copying, State.ABORTING, State.ABORTED)
    await asyncio.wait_for(watching, 10)

    assert seen[0] == (State.PLANNED, 0)
    assert [state for state, _ in seen] == sorted((state for state, _ in seen), key=list(State).index)
    assert seen[-1][0] is State.ABORTED


async def test_a_watch_of_what_has_ended_is_one_view(store: Store) -> None:
    await through(store, await begun(store), State.ABORTED)

    async with aclosing(store.watch_migration("m1")) as views:
        assert [state_of(view) async for view in views] == [State.ABORTED]


async def test_a_watcher_that_leaves_leaves_nothing(store: Store) -> None:
    await begun(store)
    before = asyncio.all_tasks()

    async with aclosing(store.watch_migration("m1")) as views:
        await anext(views)
        leaving = asyncio.create_task(anext(views))
        await asyncio.sleep(0.1)
        leaving.cancel()
        await asyncio.wait({leaving})

    await until(lambda: asyncio.all_tasks() <= before, 5)  # gRPC ends its own a moment later


async def test_ids_by_their_beginning(store: Store) -> None:
    await begun(store, "m1")
    await store.put_guest(guest(uuid="other", name="db"))
    await store.create(migration("m12", uuid="other", name="db"))

    assert (await store.migration("m1")).id == "m1"
    assert (await store.migration("m12")).id == "m12"
    with pytest.raises(PreconditionError, match="2 migrations"):
        await store.migration("m")
    with pytest.raises(NotFoundError):
        await store.migration("x")
    with pytest.raises(NotFoundError):
        await store.migration("")


async def test_guests_by_name_and_uuid(store: Store) -> None:
    await store.put_guest(guest())

    assert (await store.guest("web")).uuid == (await store.guest(UUID.upper())).uuid == UUID
    await store.put_guest(guest("h2", uuid="other"))
    with pytest.raises(PreconditionError, match="2 guests are named 'web'"):
        await store.guest("web")
    with pytest.raises(NotFoundError):
        await store.guest("nobody")


async def test_guests_are_compared_too(store: Store) -> None:
    await store.put_guest(guest())
    stale = await store.guest(UUID)
    await store.put_guest(stale)

    with pytest.raises(ConflictError):
        await store.put_guest(guest())
    with pytest.raises(ConflictError):
        await store.put_guest(stale)
    with pytest.raises(ConflictError):
        await store.delete_guest(stale)
    await store.delete_guest(await store.guest(UUID))
    assert await store.guests() == ()
