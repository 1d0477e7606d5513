"""The leader waits for disks that are pulled, whatever becomes of the agent that pulls them."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import cast

import pytest

from handoff.agent.v1.disk_pb2 import DiskMove, DiskPhase, DiskProgress, DiskStrategy
from handoff.agent.v1.qemu_pb2 import Handoff, TransferProgress
from handoff.agent.v1.types_pb2 import Fence
from handoff.controller.v1.migrations_pb2 import Migration
from handoff_common.errors import NotFoundError, UnavailableError
from handoff_controller import disks
from handoff_controller.agents import Agent
from handoff_controller.decisions import Decisions
from handoff_controller.disks import ArrivingDisks
from handoff_controller.fencing import FenceCommand
from handoff_controller.journey import Journey
from handoff_controller.settings import FencingSettings

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
    """Answers each watch by the next of these, and then by the last."""

    name = "h2"

    def __init__(self, *watches: Callable[[], AsyncGenerator[Handoff, None]]) -> None:
        self.watches = list(watches)

    def watch(self, migration_id: str, role: int) -> AsyncGenerator[Handoff, None]:
        return (self.watches.pop(0) if len(self.watches) > 1 else self.watches[0])()


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
    migration.source.host, migration.destination.host = "h1", "h2"
    agent = cast(Agent, Destination(*watches))
    return Journey(migration, Records(), agent, agent, Fence(term=1))


def arriving(way: Journey) -> ArrivingDisks:
    async def look() -> Handoff | None:
        return None

    return ArrivingDisks(way, Decisions(), FenceCommand(FencingSettings()), look)


async def test_nothing_is_waited_for_where_nothing_is_pulled() -> None:
    disks_of_guest = arriving(journey(strategy=COPY))
    assert await disks_of_guest.arrive() is None
    await disks_of_guest.wait()


async def test_the_source_waits_until_all_is_there() -> None:
    way = journey(pulls_and_dies, ends_early, is_done, strategy=PULL)
    disks_of_guest = arriving(way)
    released = asyncio.create_task(disks_of_guest.wait())
    assert await disks_of_guest.arrive() is None
    await released
    assert cast(Records, way.records).progress[0].disks[0].done_bytes == 7
    assert way.migration.disks_arrived
    assert list(way.migration.warnings) == []


async def test_a_new_leader_does_not_ask_again_for_what_has_arrived() -> None:
    way = journey(strategy=PULL)
    way.migration.disks_arrived = True
    assert await arriving(way).arrive() is None


async def test_an_agent_that_does_not_tell_is_the_operators_until_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "PATIENCE_S", 0.05)
    way = journey(is_lost, is_lost, is_lost, is_done, strategy=PULL)
    told: list[str] = []
    monkeypatch.setattr(Records, "save", saving(told))
    await arriving(way).arrive()
    assert "h2 does not tell how far its disks are: this agent has not heard of it" in told[0]
    assert "turn it off, then `handoff recover m --to source --i-have-fenced h2 --accept-loss`" in told[0]
    assert told[-1] == way.migration.needs_decision == ""
    assert list(way.migration.warnings) == []


async def test_a_source_that_gives_nothing_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "PATIENCE_S", 0.02)

    async def starves() -> AsyncGenerator[Handoff, None]:
        for _ in range(4):
            handoff = Handoff()
            handoff.CopyFrom(PULLING)
            handoff.progress.disks[0].decision = "nothing comes from 10.0.0.1:49153"
            yield handoff
            await asyncio.sleep(0.02)

    way = journey(starves, is_done, strategy=PULL)
    told: list[str] = []
    monkeypatch.setattr(Records, "save", saving(told))
    await arriving(way).arrive()
    assert "does not get the rest of its disks from h1: nothing comes from 10.0.0.1:49153" in told[0]
    assert "handoff recover m --to destination --i-have-fenced h1 --accept-loss" in told[0]
    assert told[1] == ""


def saving(told: list[str]) -> Callable[[Records, Migration], Awaitable[Migration]]:
    async def save(_: Records, migration: Migration) -> Migration:
        told.append(migration.needs_decision)
        return migration

    return save
