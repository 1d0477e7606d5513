"""Something other than the leader breaks in the middle of a move: the guest runs once, where the record says."""

import asyncio
import os
import signal
import time

import pytest
from moves import OBSERVER, Subject, order_held_up, qemu_on, story

from handoff.controller.v1.migrations_pb2 import Migration, MigrationOptions
from handoff_controller.machine import State, state_of
from handoff_lab.fleet import Fleet
from handoff_lab.guest import Guests
from handoff_lab.node import wait_for
from handoff_lab.probe import TcpSession

pytestmark = pytest.mark.lab

SLOW = MigrationOptions(bandwidth_bytes_per_s=16 << 20)
"""A copy that takes some seconds."""
SWITCH_DEADLINE_S = 2.0
"""The default of MigrationOptions.switch_deadline."""


def gone_from(fleet: Fleet, host: str, guest: str) -> None:
    """Waits until the host's libvirtd has noticed the end of the guest's QEMU."""
    found = Guests(fleet)
    wait_for(lambda: all(seen.host != host for seen in found.find(guest)), 10, f"{guest} gone from {host}")


async def ended(subject: Subject, migration: Migration, expected: State, host: str) -> Migration:
    """The migration's end: as expected, and the guest whole on that host."""
    migration = await subject.moves.ends(migration.id)
    assert state_of(migration) is expected, story(migration)
    await subject.must_be_at(host)
    return migration


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_an_agent_dies_during_the_copy_and_comes_back(subject: Subject, fleet: Fleet, side: str) -> None:
    """QEMU copies on without it, and the move is finished."""
    here, there = await subject.host(), await subject.away()
    migration = await subject.moves.create(subject.name, there, SLOW)
    await subject.moves.copies(migration.id)
    agent = fleet.daemon(here if side == "source" else there, "agent")
    await asyncio.to_thread(agent.signal, signal.SIGKILL)
    await asyncio.to_thread(agent.start)
    await ended(subject, migration, State.DONE, there)


@pytest.mark.parametrize("state", [State.COPYING, State.SWITCHING], ids=lambda state: state.name)
async def test_the_destinations_qemu_dies(subject: Subject, fleet: Fleet, state: State) -> None:
    here, there = await subject.host(), await subject.away()
    async with TcpSession(fleet.node(OBSERVER), subject.record.ip) as session:
        migration = await subject.moves.create(subject.name, there, SLOW)
        await subject.moves.reaches(migration.id, State.COPYING)
        victim = await asyncio.to_thread(qemu_on, fleet, there, subject.name)
        await subject.moves.reaches(migration.id, state)
        os.kill(victim, signal.SIGKILL)
        await ended(subject, migration, State.ABORTED, here)
    assert session.result().survived, session.result()


async def test_the_destinations_qemu_freezes_in_the_pause(subject: Subject, fleet: Fleet) -> None:
    """The switch's deadline brings the guest back; the record says how long it stood still."""
    here, there = await subject.host(), await subject.away()
    async with TcpSession(fleet.node(OBSERVER), subject.record.ip) as session:
        async with order_held_up(subject, there) as migration:
            victim = await asyncio.to_thread(qemu_on, fleet, there, subject.name)
            os.kill(victim, signal.SIGSTOP)
        migration = await ended(subject, migration, State.ABORTED, here)
        result = await session.close()
    assert result.survived, result
    assert result.longest_silence_ms < 1000 * SWITCH_DEADLINE_S + 1500
    assert migration.outcome.downtime_ms < 1000 * SWITCH_DEADLINE_S + 1000


async def test_the_destinations_agent_dies_after_the_commit(subject: Subject, fleet: Fleet) -> None:
    """Forward only: the guest waits, held, until the agent is back to run it."""
    there = await subject.away()
    agent = fleet.daemon(there, "agent")
    async with TcpSession(fleet.node(OBSERVER), subject.record.ip) as session:
        async with order_held_up(subject, there) as migration:
            await asyncio.to_thread(agent.signal, signal.SIGKILL)
        await subject.moves.reaches(migration.id, State.COMMITTED)
        await asyncio.to_thread(agent.start)
        await ended(subject, migration, State.DONE, there)
    assert session.result().survived, session.result()


async def test_the_commit_is_taken_back_on_proof_that_the_copy_never_ran(subject: Subject, fleet: Fleet) -> None:
    """The destination's QEMU dies committed and not yet resumed: its agent can tell, and the source runs."""
    here, there = await subject.host(), await subject.away()
    agent = fleet.daemon(there, "agent")
    async with order_held_up(subject, there) as migration:
        victim = await asyncio.to_thread(qemu_on, fleet, there, subject.name)
        agent.signal(signal.SIGSTOP)
    try:
        await subject.moves.reaches(migration.id, State.COMMITTED)
        os.kill(victim, signal.SIGKILL)
        await asyncio.to_thread(gone_from, fleet, there, subject.name)
    finally:
        agent.signal(signal.SIGCONT)
    migration = await ended(subject, migration, State.ABORTED, here)
    assert there in migration.error
    assert State.COMMITTED in [State(change.state) for change in migration.timeline]


async def test_the_link_between_the_hosts_is_cut_during_the_copy(subject: Subject, fleet: Fleet) -> None:
    """The guest never stops, and the abort comes within seconds of the kernel's own limit, not minutes."""
    here, there = await subject.host(), await subject.away()
    migration = await subject.moves.create(subject.name, there, SLOW)
    await subject.moves.reaches(migration.id, State.COPYING)
    began = time.monotonic()
    await asyncio.to_thread(fleet.set_link, there, False, False, True)
    try:
        migration = await subject.moves.ends(migration.id)
    finally:
        await asyncio.to_thread(fleet.set_link, there, True)
    assert state_of(migration) is State.ABORTED, story(migration)
    assert time.monotonic() - began < 30
    await subject.must_be_at(here)
