"""What others hear of a handoff, and when."""

import asyncio

import pytest

from handoff_agent.handoff import Handoff
from handoff_agent.ledger import Record
from handoff_agent.rules import ACTIVE, DESTINATION, HELD, PREPARED, SOURCE, SWITCHING
from handoff_common.errors import ExhaustedError


async def test_nobody_hears_of_what_is_not_on_disk() -> None:
    """A leader that heard HELD runs the other copy: the agent's next life must know that it did."""
    told: list[str] = []
    begun, on_disk = asyncio.Event(), asyncio.Event()

    async def save(record: Record) -> None:
        begun.set()
        await on_disk.wait()

    handoff = Handoff(Record(migration_id="m", role=SOURCE, state=SWITCHING), save, told.append)
    change = handoff.next_change()
    changing = asyncio.create_task(handoff.change(state=HELD))
    await begun.wait()
    assert (handoff.state, handoff.to_message().state, told) == (HELD, SWITCHING, [])
    assert not change.is_set()
    on_disk.set()
    await changing
    assert (handoff.to_message().state, told) == (HELD, ["m"])
    assert change.is_set()


async def test_what_cant_be_written_down_is_not_so() -> None:
    """Else the call that is repeated would be answered as carried out, with the state before it."""
    told: list[str] = []

    async def save(record: Record) -> None:
        raise ExhaustedError("no room")

    handoff = Handoff(Record(migration_id="m", role=DESTINATION, state=PREPARED), save, told.append)
    with pytest.raises(ExhaustedError):
        await handoff.change(state=ACTIVE)
    assert (handoff.state, handoff.to_message().state, told) == (PREPARED, PREPARED, [])
