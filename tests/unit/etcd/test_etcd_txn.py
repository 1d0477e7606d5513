import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from etcd_cluster import EtcdCluster, until

from handoff_common.errors import DeadlineError, UnavailableError
from handoff_controller.etcd.client import EtcdClient, prefix_end
from handoff_controller.etcd.txn import (
    Compare,
    Op,
    applies_once,
    created_at,
    delete,
    missing,
    modified_at,
    put,
    read,
)


class Proxy:
    """Passes bytes to a member; holds the answers back while `open` is cleared."""

    def __init__(self, endpoint: str) -> None:
        self._host, port = endpoint.split(":")
        self._port = int(port)
        self.open = asyncio.Event()
        self.open.set()
        self.address = ""
        self._links: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator["Proxy"]:
        server = await asyncio.start_server(self._link, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for link in self._links:
                link.cancel()
            await asyncio.gather(*self._links, return_exceptions=True)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        up_reader, up_writer = await asyncio.open_connection(self._host, self._port)
        try:
            await asyncio.gather(self._pump(reader, up_writer, held=False), self._pump(up_reader, writer, held=True))
        finally:
            writer.close()
            up_writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, held: bool) -> None:
        while data := await reader.read(1 << 16):
            if held:
                await self.open.wait()
            writer.write(data)
            await writer.drain()


async def test_reads_and_revisions(client: EtcdClient, prefix: str) -> None:
    key = prefix + "a"
    assert await client.get(key) is None
    created = await client.txn([missing(key)], [put(key, b"1"), read(key), read(prefix + "none")])
    assert created.succeeded and not created.uncertain
    found, nothing = created.reads
    assert nothing is None and found is not None
    assert (found.value, found.create_revision, found.mod_revision) == (b"1", created.revision, created.revision)
    changed = await client.txn([modified_at(key, created.revision)], [put(key, b"2")])
    now = await client.get(key)
    assert now is not None
    assert (now.value, now.create_revision, now.mod_revision, now.version) == (
        b"2",
        created.revision,
        changed.revision,
        2,
    )
    await client.txn([], [put(prefix + "b", b"3"), put(prefix.removesuffix("/") + "0", b"outside")])
    revision, items = await client.list(prefix)
    assert [(item.key, item.value) for item in items] == [(key, b"2"), (prefix + "b", b"3")]
    assert revision > changed.revision
    await client.txn([], [delete(key)])
    assert await client.get(key) is None


async def test_only_one_writer_wins(client: EtcdClient, prefix: str) -> None:
    key = prefix + "record"
    start = (await client.txn([missing(key)], [put(key, b"0")])).revision
    results = await asyncio.gather(
        *(client.txn([modified_at(key, start)], [put(key, b"%d" % number)], [read(key)]) for number in range(1, 9))
    )
    (winner,) = (number for number, result in enumerate(results, 1) if result.succeeded)
    for result in results:
        if not result.succeeded:
            (seen,) = result.reads
            assert seen is not None and seen.value == b"%d" % winner


async def test_write_is_refused_once_the_guard_is_gone(client: EtcdClient, prefix: str) -> None:
    leader, record = prefix + "leader", prefix + "record"
    term = (await client.txn([missing(leader)], [put(leader, b"A")])).revision
    guard = created_at(leader, term)
    assert (await client.txn([guard, missing(record)], [put(record, b"A")])).succeeded
    await client.txn([], [put(leader, b"A, refreshed")])
    written = await client.txn([guard], [put(record, b"A again")])
    assert written.succeeded
    await client.txn([], [delete(leader)])
    await client.txn([missing(leader)], [put(leader, b"B")])
    assert not (await client.txn([guard, modified_at(record, written.revision)], [put(record, b"stale")])).succeeded
    now = await client.get(record)
    assert now is not None and now.value == b"A again"


async def test_repeated_after_a_lost_answer(cluster: EtcdCluster, prefix: str) -> None:
    """The first try is applied, its answer lost; the second is refused, and says that this may be our own doing."""
    key = prefix + "record"
    async with Proxy(cluster.endpoints[0]).serve() as proxy, EtcdClient([proxy.address]) as client:
        await client.get(key)
        proxy.open.clear()
        asyncio.get_running_loop().call_later(1.2, proxy.open.set)
        result = await client.txn([missing(key)], [put(key, b"mine")], [read(key)])
        assert not result.succeeded and result.uncertain
        (there,) = result.reads
        assert there is not None and (there.value, there.version) == (b"mine", 1)


async def test_not_repeated_when_it_could_be_applied_twice(cluster: EtcdCluster, prefix: str) -> None:
    key = prefix + "record"
    async with Proxy(cluster.endpoints[0]).serve() as proxy, EtcdClient([proxy.address]) as client:
        await client.get(key)
        proxy.open.clear()
        with pytest.raises(DeadlineError):
            await client.txn([], [put(key, b"blind")])
        proxy.open.set()
        there = await client.get(key)
        assert there is not None and there.version == 1


async def test_unavailable_means_not_applied(prefix: str) -> None:
    async with EtcdClient(["127.0.0.1:1"]) as client:
        with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
            await client.txn([], [put(prefix, b"")], deadline_s=0.5)


async def test_member_without_leader_refuses(cluster: EtcdCluster, prefix: str) -> None:
    leader = cluster.leader()
    alone, other = (member for member in range(3) if member != leader)
    async with EtcdClient([cluster.endpoints[alone]]) as client:
        await client.get(prefix)
        cluster.freeze(leader)
        cluster.freeze(other)

        async def refused() -> bool:
            try:
                await client.txn([], [put(prefix + "a", b"")], deadline_s=0.5)
            except UnavailableError as error:
                return "no leader" in error.message
            except DeadlineError:
                return False
            return False

        await until(refused, 6)


@pytest.mark.parametrize(
    ("compares", "ops", "once"),
    [
        ([], [put("/a", b"")], False),
        ([], [read("/a")], True),
        ([missing("/a")], [put("/a", b"")], True),
        ([missing("/a")], [delete("/a")], False),
        ([modified_at("/a", 5)], [put("/a", b"")], True),
        ([modified_at("/a", 5)], [delete("/a")], True),
        ([modified_at("/b", 5)], [put("/a", b"")], False),
        ([created_at("/a", 5)], [put("/a", b"")], False),
        ([created_at("/a", 5)], [delete("/a")], True),
        ([created_at("/leader", 3), modified_at("/a", 5)], [put("/a", b""), put("/b", b"")], True),
    ],
)
def test_applies_once(compares: list[Compare], ops: list[Op], once: bool) -> None:
    assert applies_once(compares, ops) is once


def test_prefix_end() -> None:
    assert prefix_end("/a/") == b"/a0"
    with pytest.raises(ValueError, match="whole store"):
        prefix_end("")
