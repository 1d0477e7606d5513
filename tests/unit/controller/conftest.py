from typing import cast

import pytest
import pytest_asyncio
from etcd_cluster import EtcdCluster
from leading import LastingLease, Lead

from handoff_controller.etcd.client import EtcdClient
from handoff_controller.etcd.election import LEADER_PREFIX, Leadership
from handoff_controller.etcd.lease import Lease
from handoff_controller.etcd.txn import delete, put
from handoff_controller.store import Store


@pytest.fixture
def empty(cluster: EtcdCluster) -> None:
    """No records of another test."""
    cluster.ctl("del", "--prefix", "/handoff/v1/", members=[0])


@pytest_asyncio.fixture
async def lead(client: EtcdClient, empty: None) -> Lead:
    keys: list[str] = []

    async def elect() -> Leadership:
        if keys:
            await client.txn([], [delete(keys[-1])])
        keys.append(f"{LEADER_PREFIX}{len(keys)}")
        entered = await client.txn([], [put(keys[-1], b'{"name": "c", "address": "127.0.0.1:1"}')])
        return Leadership(cast(Lease, LastingLease()), keys[-1], entered.revision)

    return elect


@pytest_asyncio.fixture
async def store(client: EtcdClient, lead: Lead) -> Store:
    return Store(client, await lead())
