import asyncio
import time

import pytest
from etcd_cluster import EtcdCluster

from handoff_common.errors import InvalidArgumentError
from handoff_controller.etcd.client import EtcdClient
from handoff_controller.etcd.lease import Lease
from handoff_controller.etcd.txn import put


async def test_keys_go_with_the_lease(client: EtcdClient, prefix: str) -> None:
    key = prefix + "mine"
    async with Lease(client, 60) as lease:
        await client.txn([], [put(key, b"", lease.id)])
        assert lease.valid()
        there = await client.get(key)
        assert there is not None and there.lease == lease.id
    assert await client.get(key) is None


async def test_lost_when_etcd_drops_it(cluster: EtcdCluster, client: EtcdClient) -> None:
    async with Lease(client) as lease:
        cluster.ctl("lease", "revoke", f"{lease.id:x}")
        # Told by the next refresh, after 1.5 s: the local deadline is 4.5 s away or more.
        async with asyncio.timeout(4):
            await lease.lost.wait()
        assert not lease.valid()


async def test_lost_at_the_local_deadline_without_quorum(cluster: EtcdCluster, client: EtcdClient) -> None:
    async with Lease(client, 6) as lease:
        leader = cluster.leader()
        frozen = (leader, (leader + 1) % 3)
        started = time.monotonic()
        for member in frozen:
            cluster.freeze(member)
        async with asyncio.timeout(8):
            await lease.lost.wait()
        # Six seconds from the last refresh, of about 1.5 s ago or less; the loop may be late.
        assert 3 < time.monotonic() - started < 7
        assert not lease.valid()
        for member in frozen:
            cluster.thaw(member)


def test_short_ones_are_refused(client: EtcdClient) -> None:
    with pytest.raises(InvalidArgumentError, match="6 s or more"):
        Lease(client, 3)
