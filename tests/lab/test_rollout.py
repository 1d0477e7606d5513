"""All guests of a host get another QEMU: in turn, past the leader's death, no further than the first failure."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc
import grpc.aio
import pytest
from moves import CALL_S, MOVE_S, Moves, Subject

from handoff.controller.v1.migrations_pb2 import MigrationKind
from handoff.controller.v1.rollouts_pb2 import (
    CancelRolloutRequest,
    CreateRolloutRequest,
    Rollout,
    WatchRolloutRequest,
)
from handoff.controller.v1.rollouts_pb2_grpc import RolloutsServiceStub
from handoff_common.channel import open_channel
from handoff_controller.rollout import FINAL, Phase, Turn, phase_of, turn_of
from handoff_lab.fleet import Fleet
from handoff_lab.guest import Guests, virsh

pytestmark = pytest.mark.lab

HOST = "h1"


def builds(fleet: Fleet) -> tuple[str, str]:
    """The preferred build, and its rebuild."""
    first = fleet.lab.release().name
    return first, f"{first}-rebuilt"


class Rollouts:
    """The fleet's rollouts, through one controller."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._api = RolloutsServiceStub(channel)

    async def create(self, release: str, *, parallel: int = 1, keep_going: bool = False) -> Rollout:
        request = CreateRolloutRequest(host=HOST, release=release, parallel=parallel, keep_going=keep_going)
        return (await self._api.CreateRollout(request, timeout=CALL_S)).rollout

    async def cancel(self, rollout_id: str) -> Rollout:
        return (await self._api.CancelRollout(CancelRolloutRequest(id=rollout_id), timeout=CALL_S)).rollout

    async def watch(self, rollout_id: str) -> AsyncIterator[Rollout]:
        call = self._api.WatchRollout(WatchRolloutRequest(id=rollout_id), timeout=MOVE_S)
        try:
            async for update in call:
                yield update.rollout
        finally:
            call.cancel()

    async def until(self, rollout_id: str, turn: Turn) -> Rollout:
        """Waits until a guest is that far."""
        async with aclosing(self.watch(rollout_id)) as updates:
            async for rollout in updates:
                if turn in turns(rollout):
                    return rollout
        raise AssertionError(f"the watch ended before a guest was {turn.name}")

    async def ends(self, rollout_id: str) -> Rollout:
        async with aclosing(self.watch(rollout_id)) as updates:
            async for rollout in updates:
                if phase_of(rollout) in FINAL:
                    return rollout
        raise AssertionError("the watch ended before the rollout")


def turns(rollout: Rollout) -> list[Turn]:
    return [turn_of(guest) for guest in rollout.guests]


@pytest.fixture
async def three(moves: Moves, guests: Guests) -> list[Subject]:
    return await asyncio.gather(*(Subject.create(moves, f"roll-{number}", HOST) for number in range(1, 4)))


async def runs_under(subject: Subject, release: str) -> None:
    await subject.must_be_at(HOST)
    async with asyncio.timeout(20):
        while True:
            if (await subject.moves.guest(subject.name)).domain.emulator_name == release:
                return
            await asyncio.sleep(0.2)


async def test_all_guests_of_a_host(fleet: Fleet, moves: Moves, three: list[Subject]) -> None:
    """Two at a time; a second rollout is refused meanwhile, and one after it has nothing to do."""
    _, rebuilt = builds(fleet)
    async with open_channel(f"unix:{fleet.lab.controller_socket('ctl1')}") as channel:
        rollouts = Rollouts(channel)
        rollout = await rollouts.create(rebuilt, parallel=2)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await rollouts.create(rebuilt)
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert rollout.id in (refused.value.details() or "")
        ended = await rollouts.ends(rollout.id)
        assert phase_of(ended) is Phase.DONE, ended
        assert turns(ended) == [Turn.UPGRADED] * 3
        for subject, guest in zip(three, ended.guests, strict=True):
            await runs_under(subject, rebuilt)
            migration = await moves.get(guest.migration_id)
            assert migration.kind == MigrationKind.MIGRATION_KIND_UPGRADE
        again = await rollouts.ends((await rollouts.create(rebuilt)).id)
        assert (phase_of(again), turns(again)) == (Phase.DONE, [Turn.SKIPPED] * 3)


async def test_the_leader_dies_in_the_middle(fleet: Fleet, moves: Moves, three: list[Subject]) -> None:
    _, rebuilt = builds(fleet)
    leader = await moves.wait_leader()
    other = next(name for name in moves.controllers if name != leader.name)
    async with open_channel(f"unix:{fleet.lab.controller_socket(other)}") as channel:
        rollouts = Rollouts(channel)
        rollout = await rollouts.create(rebuilt)
        await rollouts.until(rollout.id, Turn.UPGRADED)
        await asyncio.to_thread(fleet.daemon(leader.name, "controller").signal, signal.SIGKILL)
        ended = await rollouts.ends(rollout.id)
    await asyncio.to_thread(fleet.up)
    assert phase_of(ended) is Phase.DONE, ended
    assert turns(ended) == [Turn.UPGRADED] * 3
    last = await moves.get(ended.guests[-1].migration_id, other)
    assert last.timeline[-1].term > leader.term
    for subject in three:
        await runs_under(subject, rebuilt)


@pytest.mark.parametrize("keep_going", [False, True])
async def test_a_guest_that_fails(fleet: Fleet, three: list[Subject], keep_going: bool) -> None:
    """The first can't be upgraded (it has a snapshot): it stops the rollout, unless told otherwise."""
    first, rebuilt = builds(fleet)
    host = fleet.host(HOST)
    await asyncio.to_thread(virsh, host, "a", "snapshot-create-as", three[0].name, "before", "--disk-only")
    try:
        async with open_channel(f"unix:{fleet.lab.controller_socket('ctl1')}") as channel:
            rollouts = Rollouts(channel)
            ended = await rollouts.ends((await rollouts.create(rebuilt, keep_going=keep_going)).id)
    finally:
        await asyncio.to_thread(virsh, host, "a", "snapshot-delete", three[0].name, "before", "--metadata")
    assert phase_of(ended) is Phase.FAILED, ended
    rest = Turn.UPGRADED if keep_going else Turn.PENDING
    assert turns(ended) == [Turn.FAILED, rest, rest]
    assert "snapshot" in ended.guests[0].reason
    for subject, release in zip(three, (first, *[rebuilt if keep_going else first] * 2), strict=True):
        await runs_under(subject, release)


async def test_cancel(fleet: Fleet, three: list[Subject]) -> None:
    """What is under way is finished, no more is begun."""
    first, rebuilt = builds(fleet)
    async with open_channel(f"unix:{fleet.lab.controller_socket('ctl1')}") as channel:
        rollouts = Rollouts(channel)
        rollout = await rollouts.create(rebuilt)
        await rollouts.until(rollout.id, Turn.UPGRADING)
        await rollouts.cancel(rollout.id)
        ended = await rollouts.ends(rollout.id)
    assert phase_of(ended) is Phase.CANCELLED, ended
    assert turns(ended)[1:] == [Turn.PENDING] * 2
    await runs_under(three[-1], first)
