import asyncio
from collections.abc import Callable
from contextlib import aclosing

import grpc
import grpc.aio
import pytest
from etcd_cluster import EtcdCluster, until

from handoff_controller.etcd.client import EtcdClient
from handoff_controller.etcd.txn import delete, missing, put
from handoff_controller.etcd.watch import Change, Delete, Put, Resync, follow, watch


async def take(client: EtcdClient, key: str, start_revision: int, count: int) -> list[Change]:
    taken: list[Change] = []
    async with aclosing(watch(client, key, start_revision)) as changes:
        async for change in changes:
            taken.append(change)
            if len(taken) == count:
                break
    return taken


async def test_one_key_and_a_folder(client: EtcdClient, prefix: str) -> None:
    first = (await client.txn([], [put(prefix + "a", b"1"), put(prefix + "ab", b"2")])).revision
    await client.txn([], [put(prefix + "a", b"3")])
    last = (await client.txn([], [delete(prefix + "a")])).revision
    below = await take(client, prefix, first, 4)
    assert [type(change) for change in below] == [Put, Put, Put, Delete]
    assert below[-1] == Delete(last, prefix + "a")
    alone = await take(client, prefix + "a", first, 3)
    assert alone == [change for change in below if not (isinstance(change, Put) and change.item.key.endswith("ab"))]


@pytest.mark.parametrize("harm", [EtcdCluster.kill, EtcdCluster.freeze], ids=["killed", "frozen"])
async def test_nothing_lost_with_the_member_it_is_on(
    cluster: EtcdCluster, client: EtcdClient, prefix: str, harm: Callable[[EtcdCluster, int], None]
) -> None:
    count = 150
    keys = [f"{prefix}{number:03}" for number in range(count)]
    revision, _ = await client.list(prefix)
    watching = asyncio.create_task(take(client, prefix, revision + 1, count))
    await until(lambda: cluster.watched() is not None, 5)
    victim = cluster.watched()
    assert victim is not None
    for number, key in enumerate(keys):
        if number == count // 3:
            harm(cluster, victim)
        written = await client.txn([missing(key)], [put(key, b"")], deadline_s=20)
        assert written.succeeded or written.uncertain
    changes = await asyncio.wait_for(watching, 10)
    assert [change.item.key for change in changes if isinstance(change, Put)] == keys


class CutAtOnce:
    """A call whose stream breaks as it is written to, as grpc.aio tells it."""

    async def write(self, _request: object) -> None:
        nothing = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, nothing, nothing, "Internal error from Core")

    def cancel(self) -> bool:
        return True


async def test_a_stream_that_breaks_as_it_is_opened_is_opened_again(
    client: EtcdClient, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = (await client.txn([], [put(prefix + "a", b"1")])).revision
    real, cut = client.watch_stub.Watch, [CutAtOnce()]
    monkeypatch.setattr(client.watch_stub, "Watch", lambda **options: cut.pop() if cut else real(**options))
    (change,) = await asyncio.wait_for(take(client, prefix, revision, 1), 5)
    assert isinstance(change, Put)


async def test_resync_after_compaction(cluster: EtcdCluster, client: EtcdClient, prefix: str) -> None:
    first = (await client.txn([], [put(prefix + "a", b"1"), put(prefix + "b", b"1")])).revision
    await client.txn([], [delete(prefix + "a")])
    last = (await client.txn([], [put(prefix + "b", b"2")])).revision
    cluster.ctl("compact", str(last))
    async with aclosing(watch(client, prefix, first)) as changes:
        resync = await anext(changes)
        assert isinstance(resync, Resync) and resync.revision >= last
        assert [(item.key, item.value) for item in resync.items] == [(prefix + "b", b"2")]
        await client.txn([], [put(prefix + "c", b"3")])
        after = await anext(changes)
        assert isinstance(after, Put) and after.item.key == prefix + "c"
    alone = await take(client, prefix + "b", first, 1)
    assert isinstance(alone[0], Resync) and [item.key for item in alone[0].items] == [prefix + "b"]


async def test_compacted_while_it_was_away(cluster: EtcdCluster, client: EtcdClient, prefix: str) -> None:
    """The consumer is busy, its member dies, history goes: it gets what was in flight and then the full state."""
    revision, _ = await client.list(prefix)
    async with aclosing(follow(client, prefix)) as views:
        assert await anext(views) == {}
        await client.txn([], [put(prefix + "a", b"1")])
        assert list(await anext(views)) == [prefix + "a"]
        await until(lambda: cluster.watched() is not None, 5)
        victim = cluster.watched()
        assert victim is not None
        cluster.kill(victim)
        others = [member for member in range(3) if member != victim]
        result = await client.txn([missing(prefix + "b")], [put(prefix + "b", b"2")], deadline_s=20)
        for _ in range(2):
            result = await client.txn([], [delete(prefix + "a"), put(prefix + "b", b"3")], deadline_s=20)
        assert result.revision > revision
        cluster.ctl("compact", str(result.revision), members=others)
        async with asyncio.timeout(10):
            async for view in views:
                if {key: item.value for key, item in view.items()} == {prefix + "b": b"3"}:
                    break


async def test_its_call_ends_with_it(cluster: EtcdCluster, client: EtcdClient, prefix: str) -> None:
    tasks_before = len(asyncio.all_tasks())
    revision, _ = await client.list(prefix)
    async with aclosing(watch(client, prefix, revision + 1)) as changes:
        waiting = asyncio.ensure_future(anext(changes))
        await until(lambda: cluster.watched() is not None, 5)
        waiting.cancel()
        await asyncio.wait([waiting])
    await until(lambda: cluster.watched() is None, 5)
    # gRPC ends its own task for a cancelled call a moment later.
    await until(lambda: len(asyncio.all_tasks()) <= tasks_before, 2)
