"""The leader waits for disks that are pulled, whatever becomes of the agent that pulls them."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import cast

import pytest

from handoff.agent.v1.disk_pb2 import DiskMove, DiskPhase, DiskProgress, DiskStrategy
from handoff.agent.v1.qemu_pb2 import Handoff, TransferProgress
from handoff.agent.v1.types_pb2 import Fence
from handoff.controller.v1.migrations_pb2 import Migration
from handoff_common.errors import NotFoundError, UnavailableError
from handoff_controller import disks
from handoff_controller.agents import Agent
from handoff_controller.disks import ArrivingDisks
from handoff_controller.journey import Journey

PULL, COPY = DiskStrategy.DISK_STRATEGY_PULL, DiskStrategy.DISK_STRATEGY_COPY
PULLING = Handoff(
    pulling=True,
    progress=TransferProgress(disks=[DiskProgress(target="vda", phase=DiskPhase.DISK_PHASE_PULLING, done_bytes=7)]),
)


class Records:
    def __init__(self) -> None:
        self.progress: list[TransferProgress] = []

    async def save(self, migration: Migration) -> Migration:
        return migration

    async def put_progress(self, migration_id: str, progress: TransferProgress) -> None:
        self.progress.append(progress)


class Destination:
    """Answers each watch by the next of these."""

    name = "h2"

    def __init__(self, *watches: Callable[[], AsyncGenerator[Handoff, None]]) -> None:
        self.watches = list(watches)

    def watch(self, migration_id: str, role: int) -> AsyncGenerator[Handoff, None]:
        return self.watches.pop(0)()


async def pulls_and_dies() -> AsyncGenerator[Handoff, None]:
    yield PULLING
    raise UnavailableError("agent of h2 is silent")


async def is_lost() -> AsyncGenerator[Handoff, None]:
    raise NotFoundError("this agent has not heard of it")
    yield Handoff()


async def ends_early() -> AsyncGenerator[Handoff, None]:
    yield PULLING


async def is_done() -> AsyncGenerator[Handoff, None]:
    yield PULLING
    yield Handoff()


def journey(*watches: Callable[[], AsyncGenerator[Handoff, None]], strategy: "DiskStrategy.ValueType") -> Journey:
    migration = Migration(id="m", disks=[DiskMove(target="vda", strategy=strategy)])
    migration.destination.host = "h2"
    agent = cast(Agent, Destination(*watches))
    return Journey(migration, Records(), agent, agent, Fence(term=1))


async def test_nothing_is_waited_for_where_nothing_is_pulled() -> None:
    arriving = ArrivingDisks(journey(strategy=COPY))
    await arriving.arrive()
    await arriving.wait()


async def test_the_source_waits_until_all_is_there() -> None:
    way = journey(pulls_and_dies, ends_early, is_done, strategy=PULL)
    arriving = ArrivingDisks(way)
    released = asyncio.create_task(arriving.wait())
    await arriving.arrive()
    await released
    assert cast(Records, way.records).progress[0].disks[0].done_bytes == 7
    assert list(way.migration.warnings) == []


async def test_an_agent_that_does_not_tell_is_a_warning_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "PATIENCE_S", 0.05)
    way = journey(is_lost, is_lost, is_done, strategy=PULL)
    await ArrivingDisks(way).arrive()
    assert list(way.migration.warnings) == ["h2 does not tell how far its disks are: this agent has not heard of it"]
