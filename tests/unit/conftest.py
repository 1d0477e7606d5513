import itertools
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from etcd_cluster import SIZE, EtcdCluster

from handoff_controller.etcd.client import EtcdClient

_numbers = itertools.count()


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    cluster = EtcdCluster(tmp_path_factory.mktemp("etcd"))
    try:
        for member in range(SIZE):
            cluster.start(member)
        yield cluster
    finally:
        cluster.stop()


@pytest_asyncio.fixture
async def cluster(running_cluster: EtcdCluster) -> AsyncIterator[EtcdCluster]:
    """The three members, all well; what a test breaks is mended for the next one."""
    await running_cluster.heal()
    yield running_cluster


@pytest_asyncio.fixture
async def client(cluster: EtcdCluster) -> AsyncIterator[EtcdClient]:
    async with EtcdClient(cluster.endpoints) as opened:
        yield opened


@pytest.fixture
def prefix() -> str:
    """A part of the key space for this test alone."""
    return f"/test/{next(_numbers)}/"
