"""The leader dies in every state of a migration, or freezes; the next one finishes, and agents refuse a stale term."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from moves import OBSERVER, Leader, Moves, Subject, order_held_up, story

from handoff.agent.v1.qemu_pb2 import AbortHandoffRequest, HandoffRole, PrepareSourceRequest
from handoff.agent.v1.qemu_pb2_grpc import QemuServiceStub
from handoff.agent.v1.types_pb2 import Fence
from handoff.controller.v1.migrations_pb2 import Migration, MigrationOptions
from handoff_common.channel import open_channel
from handoff_controller.machine import FINAL, PHASES, State, state_of
from handoff_lab.fleet import Fleet
from handoff_lab.probe import TcpSession

pytestmark = pytest.mark.lab

LIVE = [state for state in State if state not in FINAL]
SLOW = MigrationOptions(bandwidth_bytes_per_s=16 << 20)
"""A copy that takes some seconds: it does not end before the leader does."""

# Whose agent is frozen, so that a migration stays in a state until the leader has been dealt with. In the others the
# work itself takes long enough: a domain is created, memory is copied at a limited rate, another migration is awaited.
HELD_UP_BY = {
    State.PLANNED: None,
    State.PREPARING: "destination",
    State.COPYING: None,
    State.SWITCHING: None,
    State.COMMITTED: "destination",
    State.FINISHING: "source",
    State.ABORTING: "destination",
}
# The state before, in which the agent must be frozen already.
FROZEN_IN = {
    State.PREPARING: State.PLANNED,
    State.FINISHING: State.COMMITTED,
    State.ABORTING: State.COPYING,
}


def test_every_state_is_covered() -> None:
    assert set(HELD_UP_BY) == set(PHASES)


@asynccontextmanager
async def in_state(subject: Subject, state: State, watcher: str) -> AsyncIterator[Migration]:
    """A migration of the subject that is in `state`, and stays there if it can be held up."""
    moves, fleet = subject.moves, subject.fleet
    here, there = await subject.host(), await subject.away()
    blocker = None
    if state is State.COMMITTED:
        async with held_up_committed(subject, there, watcher) as migration:
            yield migration
        return
    if state is State.PLANNED:
        other = await Subject.create(moves, "blocker", here)
        blocker = await moves.create(other.name, there, SLOW, watcher)
        await moves.reaches(blocker.id, State.COPYING, watcher)
    options = SLOW if state in (State.COPYING, State.ABORTING) else MigrationOptions()
    held_up = HELD_UP_BY[state]
    agent = await pid_of(fleet, there if held_up == "destination" else here, "agent")
    migration = await moves.create(subject.name, there, options, watcher)
    try:
        if held_up:
            if state is not State.PREPARING:
                await moves.reaches(migration.id, FROZEN_IN[state], watcher)
            os.kill(agent, signal.SIGSTOP)
            if state is State.ABORTING:
                await moves.cancel(migration.id)
        await moves.reaches(migration.id, state, watcher)
        yield migration
    finally:
        if held_up:
            os.kill(agent, signal.SIGCONT)
    if blocker is not None:
        assert state_of(await moves.ends(blocker.id, watcher)) in FINAL


@asynccontextmanager
async def held_up_committed(subject: Subject, there: str, watcher: str) -> AsyncIterator[Migration]:
    agent = await pid_of(subject.fleet, there, "agent")
    try:
        async with order_held_up(subject, there, watcher) as migration:
            os.kill(agent, signal.SIGSTOP)
        await subject.moves.reaches(migration.id, State.COMMITTED, watcher)
        yield migration
    finally:
        os.kill(agent, signal.SIGCONT)


async def pid_of(fleet: Fleet, node: str, daemon: str) -> int:
    """A daemon's pid, looked up before it matters: that takes longer than some states last."""
    pid = await asyncio.to_thread(fleet.daemon(node, daemon).pid)
    assert pid is not None, f"{daemon} of {node} does not run"
    return pid


async def followed(moves: Moves) -> tuple[Leader, str]:
    """The leader, and a controller that follows it."""
    leader = await moves.wait_leader()
    return leader, next(name for name in moves.controllers if name != leader.name)


@pytest.mark.parametrize("state", LIVE, ids=lambda state: state.name)
async def test_leader_killed(subject: Subject, fleet: Fleet, state: State) -> None:
    here, there = await subject.host(), await subject.away()
    leader, watcher = await followed(subject.moves)
    controller = await pid_of(fleet, leader.name, "controller")
    async with TcpSession(fleet.node(OBSERVER), subject.record.ip) as session:
        async with in_state(subject, state, watcher) as migration:
            os.kill(controller, signal.SIGKILL)
        migration = await subject.moves.ends(migration.id, watcher)
        await asyncio.to_thread(fleet.up)
        expected = State.ABORTED if state is State.ABORTING else State.DONE
        assert state_of(migration) is expected, story(migration)
        entered = [State(change.state) for change in migration.timeline]
        following = migration.timeline[entered.index(state) + 1]
        assert following.term > leader.term, f"{story(migration)}: the old leader went on from {state.name}"
        await subject.must_be_at(there if expected is State.DONE else here)
    result = session.result()
    assert result.survived, result
    if state in (State.SWITCHING, State.COMMITTED):
        # The guest waited for the new leader: the record says so, to the exactness of a retransmission.
        assert migration.outcome.downtime_ms == pytest.approx(result.longest_silence_ms, abs=700)


async def test_a_frozen_leader_is_replaced_and_follows(subject: Subject, fleet: Fleet) -> None:
    """Frozen in the middle of the copy, replaced, revived: it changes nothing more, and answers as a follower."""
    there = await subject.away()
    leader, watcher = await followed(subject.moves)
    controller = fleet.daemon(leader.name, "controller")
    async with in_state(subject, State.COPYING, watcher) as migration:
        controller.signal(signal.SIGSTOP)
    try:
        successor = await subject.moves.wait_leader(other_than=leader.name)
        assert successor.term > leader.term
        await subject.moves.reaches(migration.id, State.COMMITTED, watcher)
    finally:
        controller.signal(signal.SIGCONT)
    migration = await subject.moves.ends(migration.id, watcher)
    assert state_of(migration) is State.DONE, story(migration)
    terms = [change.term for change in migration.timeline]
    assert terms == sorted(terms)
    assert migration.timeline[-1].term == successor.term
    await subject.must_be_at(there)
    assert (await subject.moves.leader()) == successor
    # The revived one is a follower now, and answers as one.
    assert state_of(await subject.moves.get(migration.id, leader.name)) is State.DONE


async def test_a_stale_term_is_refused_by_the_agent(subject: Subject, fleet: Fleet) -> None:
    here, there = await subject.host(), await subject.away()
    migration = await subject.moves.create(subject.name, there)
    assert state_of(await subject.moves.ends(migration.id)) is State.DONE
    leader = await subject.moves.wait_leader()
    stale = Fence(term=leader.term - 1, leader="a leader of old")
    async with open_channel(f"unix:{fleet.lab.agent_socket(there)}") as channel:
        agent = QemuServiceStub(channel)
        for call in (
            agent.PrepareSource(
                PrepareSourceRequest(fence=stale, migration_id="stale", domain_uuid=subject.record.uuid), timeout=10
            ),
            agent.AbortHandoff(
                AbortHandoffRequest(fence=stale, migration_id=migration.id, role=HandoffRole.HANDOFF_ROLE_DESTINATION),
                timeout=10,
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert f"term {stale.term}" in (refused.value.details() or "")
    assert here != there
    await subject.must_be_at(there)
