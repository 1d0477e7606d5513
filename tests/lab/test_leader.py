"""The leader dies or freezes in every state of a migration; the next one finishes, and the old one is refused."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from moves import OBSERVER, Leader, Moves, Subject, story

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

# Whose agent is frozen, so that a migration stays in a state until the leader has been dealt with. In the others the
# work itself takes long enough: a domain is created, memory is copied at a limited rate, another migration is awaited.
HELD_UP_BY = {
    State.PLANNED: None,
    State.PREPARING: None,
    State.COPYING: None,
    State.SWITCHING: None,
    State.COMMITTED: "destination",
    State.FINISHING: "source",
    State.ABORTING: "destination",
}
# The state before, in which the agent must be frozen already.
FROZEN_IN = {State.COMMITTED: State.SWITCHING, State.FINISHING: State.COMMITTED, State.ABORTING: State.COPYING}


def test_every_state_is_covered() -> None:
    assert set(HELD_UP_BY) == set(PHASES)


@asynccontextmanager
async def in_state(subject: Subject, state: State, watcher: str) -> AsyncIterator[Migration]:
    """A migration of the subject that is in `state`, and stays there if it can be held up."""
    moves, fleet = subject.moves, subject.fleet
    here, there = await subject.host(), await subject.away()
    blocker = None
    if state is State.PLANNED:
        other = await Subject.create(moves, "blocker", here)
        blocker = await moves.create(other.name, there, MigrationOptions(bandwidth_bytes_per_s=4 << 20), watcher)
        await moves.reaches(blocker.id, State.COPYING, watcher)
    slow = state in (State.COPYING, State.ABORTING)
    options = MigrationOptions(bandwidth_bytes_per_s=(8 << 20) if slow else 0)
    migration = await moves.create(subject.name, there, options, watcher)
    held_up = HELD_UP_BY[state]
    agent = fleet.daemon(there if held_up == "destination" else here, "agent")
    try:
        if held_up:
            await moves.reaches(migration.id, FROZEN_IN[state], watcher)
            agent.signal(signal.SIGSTOP)
            if state is State.ABORTING:
                await moves.cancel(migration.id)
        await moves.reaches(migration.id, state, watcher)
        yield migration
    finally:
        if held_up:
            agent.signal(signal.SIGCONT)
    if blocker is not None:
        assert state_of(await moves.ends(blocker.id, watcher)) in FINAL


async def followed(moves: Moves) -> tuple[Leader, str]:
    """The leader, and a controller that follows it."""
    leader = await moves.wait_leader()
    return leader, next(name for name in moves.controllers if name != leader.name)


@pytest.mark.parametrize("state", LIVE, ids=lambda state: state.name)
async def test_leader_killed(subject: Subject, fleet: Fleet, state: State) -> None:
    here, there = await subject.host(), await subject.away()
    leader, watcher = await followed(subject.moves)
    async with TcpSession(fleet.node(OBSERVER), subject.record.ip) as session:
        async with in_state(subject, state, watcher) as migration:
            await asyncio.to_thread(fleet.daemon(leader.name, "controller").signal, signal.SIGKILL)
        migration = await subject.moves.ends(migration.id, watcher)
        await asyncio.to_thread(fleet.up)
        expected = State.ABORTED if state is State.ABORTING else State.DONE
        assert state_of(migration) is expected, story(migration)
        assert migration.timeline[-1].term > leader.term, "the old leader finished it: the test killed it too late"
        await subject.must_be_at(there if expected is State.DONE else here)
    assert session.result().survived, session.result()


async def test_a_frozen_leader_is_replaced_and_refused(subject: Subject, fleet: Fleet) -> None:
    """Frozen in the middle of the copy, replaced, revived: it neither writes nor orders anything more."""
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
