"""What the steps of a migration share: its record while several change it, and decisions that nobody looks at."""

import asyncio
from collections.abc import AsyncGenerator
from typing import cast

import pytest
from records import migration

from handoff.agent.v1.qemu_pb2 import Handoff
from handoff.agent.v1.types_pb2 import Fence
from handoff.controller.v1.migrations_pb2 import Migration
from handoff_common.errors import UnavailableError
from handoff_controller.agents import Agent
from handoff_controller.decisions import TO_SOURCE, Decision, Decisions
from handoff_controller.journey import Journey, Records
from handoff_controller.machine import State


class SlowRecords:
    """etcd that takes its time."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.goes_on = asyncio.Event()

    async def save(self, migration: Migration) -> Migration:
        self.asked.set()
        await self.goes_on.wait()
        return migration


def a_journey(records: SlowRecords) -> Journey:
    nobody = cast(Agent, None)
    return Journey(migration(state=State.ABORTING), cast(Records, records), nobody, nobody, Fence(term=1))


async def test_a_warning_of_another_step_outlives_a_save() -> None:
    records = SlowRecords()
    way = a_journey(records)
    asks = asyncio.create_task(way.need_decision("decide"))
    await records.asked.wait()
    way.warn("the copy on h2 has not been removed")
    records.goes_on.set()
    await asks
    assert way.migration.needs_decision == "decide"
    assert list(way.migration.warnings) == ["the copy on h2 has not been removed"]


async def test_a_new_leader_does_not_take_the_destination_for_long_unheard() -> None:
    """The one before may have sent an order a moment ago."""
    assert a_journey(SlowRecords()).since_heard_s() < 5


class Ending:
    """An agent that goes away as it is asked."""

    async def watch(self, _migration_id: str, _role: int) -> AsyncGenerator[Handoff, None]:
        for handoff in ():
            yield handoff


async def test_a_watch_that_ends_before_its_first_word_is_a_silence() -> None:
    agent = cast(Agent, Ending())
    way = Journey(migration(state=State.COMMITTED), cast(Records, None), agent, agent, Fence(term=1))
    for see in (way.see_destination, way.see_source):
        with pytest.raises(UnavailableError, match="ended the watch"):
            await see()


async def test_a_decision_is_answered_whatever_becomes_of_its_driver() -> None:
    decisions = Decisions()
    waiting, looked_at = (asyncio.create_task(decisions.ask(Decision(TO_SOURCE, "alice"))) for _ in range(2))
    await decisions.next()
    decisions.close()
    for asked in (waiting, looked_at):
        with pytest.raises(UnavailableError, match="handoff show"):
            await asked
    with pytest.raises(UnavailableError, match="handoff show"):
        await decisions.ask(Decision(TO_SOURCE, "alice"))
