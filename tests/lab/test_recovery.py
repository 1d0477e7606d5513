"""How soon a guest runs again when the switch breaks, and what an operator may decide when it can't by itself."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
from moves import CALL_S, OBSERVER, Moves, Subject, order_held_up, qemu_on, story

from handoff.agent.v1.qemu_pb2 import GetHandoffRequest, HandoffRole, HandoffState
from handoff.agent.v1.qemu_pb2_grpc import QemuServiceStub
from handoff.controller.v1.migrations_pb2 import Migration, RecoverMigrationRequest, RecoveryTarget
from handoff_common.channel import open_channel
from handoff_controller.etcd.lease import MIN_TTL_S
from handoff_controller.machine import State, state_of
from handoff_lab.fleet import Fleet
from handoff_lab.guest import Guests
from handoff_lab.host import Host
from handoff_lab.node import wait_for
from handoff_lab.probe import TcpSession, UdpProbe

pytestmark = pytest.mark.lab

PROBE_US = 5000
ANSWERS_S = 0.3
AFTER_A_DEATH_S = 1.0
WITHOUT_A_LEADER_S = MIN_TTL_S + 2.0


async def ran_again_s(probe: UdpProbe, since: float) -> float:
    """Seconds from `since` (wall clock) until the guest answered again, after the silence that was then."""
    await asyncio.sleep(ANSWERS_S)
    gaps = (await probe.stop()).gaps
    ends = [end for end in (gap.began_at_s + gap.length_ms / 1000 for gap in gaps) if end > since]
    assert ends, f"the guest was never silent after {since}: {gaps}"
    return max(ends) - since


def gone_from(fleet: Fleet, host: str, guest: str) -> None:
    """Waits until the host has nothing of the guest any more."""
    found = Guests(fleet)
    wait_for(lambda: all(seen.host != host for seen in found.find(guest)), 15, f"{guest} gone from {host}")


async def recover(
    moves: Moves, migration: Migration, target: "RecoveryTarget.ValueType", fenced: str = ""
) -> Migration:
    request = RecoverMigrationRequest(id=migration.id, target=target, fenced_host=fenced, by="operator@lab")
    return (await moves.api().RecoverMigration(request, timeout=CALL_S)).migration


@asynccontextmanager
async def power_switch(moves: Moves) -> AsyncIterator[Path]:
    """Controllers whose fence command turns a host off, and ends when it is off; gives the command's log."""
    fleet = moves.fleet
    log = fleet.lab.directory / "fenced"
    script = 'echo "$1" >> "$2"; until [ -e "$2.$1.off" ]; do sleep 0.05; done'
    command = ["/bin/sh", "-c", script, "fence", "{host}", str(log)]
    for name in moves.controllers:
        settings = fleet.node(name).directory / "etc/handoff/controller.toml"
        settings.write_text(f"{settings.read_text()}\n[fencing]\ncommand = {json.dumps(command)}\n")
    await restart_controllers(moves)
    switch = asyncio.create_task(asyncio.to_thread(turn_off_next, fleet, log))
    try:
        yield log
        await switch
    finally:
        switch.cancel()
        # Everything that is off or has other settings than it should.
        await asyncio.to_thread(fleet.up)


def turn_off_next(fleet: Fleet, log: Path) -> None:
    wait_for(lambda: log.exists() and log.read_text().endswith("\n"), 60, "a word to the power switch")
    host = log.read_text().strip()
    fleet.power_off(host)
    Path(f"{log}.{host}.off").touch()


async def restart_controllers(moves: Moves) -> None:
    daemons = [moves.fleet.daemon(name, "controller") for name in moves.controllers]
    await asyncio.gather(*(asyncio.to_thread(daemon.restart) for daemon in daemons))
    await moves.wait_leader()


async def test_the_source_runs_within_a_second_of_the_destinations_death_in_the_pause(
    subject: Subject, fleet: Fleet
) -> None:
    here, there = await subject.host(), await subject.away()
    async with UdpProbe(fleet.lab, fleet.node(OBSERVER), subject.record.ip, PROBE_US) as probe:
        async with order_held_up(subject, there) as migration:
            victim = await asyncio.to_thread(qemu_on, fleet, there, subject.name)
            # The guest will be paused, and what is left of it not be taken.
            os.kill(victim, signal.SIGSTOP)
        await asyncio.sleep(0.5)
        died = time.time()
        os.kill(victim, signal.SIGKILL)
        migration = await subject.moves.ends(migration.id)
        took_s = await ran_again_s(probe, died)
    assert state_of(migration) is State.ABORTED, story(migration)
    assert took_s < AFTER_A_DEATH_S, story(migration)
    await subject.must_be_at(here)


async def test_and_within_the_lease_and_two_seconds_when_the_leader_dies_too(subject: Subject, fleet: Fleet) -> None:
    """Committed, not yet resumed: the next leader learns that the copy never ran, and takes the commit back."""
    here, there = await subject.host(), await subject.away()
    leader = await subject.moves.wait_leader()
    watcher = next(name for name in subject.moves.controllers if name != leader.name)
    controller, agent = fleet.daemon(leader.name, "controller"), fleet.daemon(there, "agent")
    async with UdpProbe(fleet.lab, fleet.node(OBSERVER), subject.record.ip, PROBE_US) as probe:
        async with order_held_up(subject, there, watcher) as migration:
            victim = await asyncio.to_thread(qemu_on, fleet, there, subject.name)
            agent.signal(signal.SIGSTOP)
        try:
            await subject.moves.reaches(migration.id, State.COMMITTED, watcher)
            died = time.time()
            controller.signal(signal.SIGKILL)
            os.kill(victim, signal.SIGKILL)
        finally:
            agent.signal(signal.SIGCONT)
        migration = await subject.moves.ends(migration.id, watcher)
        took_s = await ran_again_s(probe, died)
    await asyncio.to_thread(fleet.up)
    assert state_of(migration) is State.ABORTED, story(migration)
    assert took_s < WITHOUT_A_LEADER_S, story(migration)
    await subject.must_be_at(here)


async def test_an_operator_takes_a_committed_guest_back(subject: Subject, fleet: Fleet) -> None:
    """The destination is silent after the commit: the guest waits, held, for a word; its copy never runs."""
    moves, here, there = subject.moves, await subject.host(), await subject.away()
    agent = fleet.daemon(there, "agent")
    async with TcpSession(fleet.node(OBSERVER), subject.record.ip) as session:
        async with order_held_up(subject, there) as migration:
            await asyncio.to_thread(agent.signal, signal.SIGKILL)
        waiting = await moves.asks(migration.id)
        assert state_of(waiting) is State.COMMITTED
        assert f"--i-have-fenced {there}" in waiting.needs_decision
        assert (await moves.guest(subject.name)).needs_decision == waiting.needs_decision
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await recover(moves, migration, RecoveryTarget.RECOVERY_TARGET_SOURCE)
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        await recover(moves, migration, RecoveryTarget.RECOVERY_TARGET_SOURCE, fenced=there)
        migration = await moves.ends(migration.id)
        await asyncio.to_thread(agent.start)
        assert state_of(migration) is State.ABORTED, story(migration)
        assert "by the word of operator@lab" in migration.recovery.how
        await asyncio.to_thread(gone_from, fleet, there, subject.name)
        await subject.must_be_at(here)
    assert session.result().survived, session.result()
    async with open_channel(f"unix:{fleet.lab.agent_socket(there)}") as channel:
        request = GetHandoffRequest(migration_id=migration.id, role=HandoffRole.HANDOFF_ROLE_DESTINATION)
        assert (await QemuServiceStub(channel).GetHandoff(request, timeout=CALL_S)).handoff.never_ran


async def test_the_fence_command_turns_the_silent_host_off_and_the_source_goes_on(
    subject: Subject, fleet: Fleet
) -> None:
    """Until it is asked for, the guest stays paused, and what to decide is said."""
    moves, here, there = subject.moves, await subject.host(), await subject.away()
    async with TcpSession(fleet.node(OBSERVER), subject.record.ip) as session:
        async with power_switch(moves) as fenced:
            async with order_held_up(subject, there) as migration:
                fleet.daemon(there, "agent").signal(signal.SIGKILL)
            waiting = await moves.asks(migration.id)
            assert state_of(waiting) is State.COMMITTED
            assert f"`handoff recover {migration.id} --to source` fences {there}" in waiting.needs_decision
            seen = await asyncio.to_thread(Guests(fleet).find, subject.name)
            assert {(one.host, one.state) for one in seen} == {(here, "paused"), (there, "paused")}
            assert not fenced.exists()
            await recover(moves, migration, RecoveryTarget.RECOVERY_TARGET_SOURCE)
            migration = await moves.ends(migration.id)
            assert fenced.read_text().split() == [there]
            assert state_of(migration) is State.ABORTED, story(migration)
            assert migration.recovery.how == f"{there} was fenced by /bin/sh"
            assert (migration.recovery.fenced_host, migration.recovery.by) == (there, "operator@lab")
            assert migration.needs_decision == ""
            assert await subject.host() == here
        await subject.must_be_at(here)
    assert session.result().survived, session.result()


async def knows_that_it_runs(host: Host, migration: Migration) -> None:
    """Until the agent there has that on disk: before, it could not tell after a reboot whether the guest ever ran."""
    record = host.directory / "agent" / "handoffs" / f"{migration.id}.destination.json"

    def runs() -> bool:
        return bool(json.loads(record.read_text())["state"] == HandoffState.HANDOFF_STATE_ACTIVE)

    await asyncio.to_thread(wait_for, runs, CALL_S, "the agent's record that the guest runs")


async def test_a_guest_whose_host_dies_after_the_commit_is_lost_and_its_migration_is_not_failed(
    moves: Moves, guests: Guests, fleet: Fleet
) -> None:
    """It ran there before the power went: the copy at its source is of the past, and nobody runs it."""
    # A name of its own: the record of a lost guest stays.
    subject = await Subject.create(moves, "doomed", "h1")
    here, there = await subject.host(), await subject.away()
    agent, etcd = fleet.daemon(there, "agent"), fleet.daemon("etcd1", "etcd")
    async with order_held_up(subject, there) as migration:
        agent.signal(signal.SIGSTOP)
    try:
        await moves.reaches(migration.id, State.COMMITTED)
        # It is told to run the guest, and nobody can write down that it does.
        etcd.signal(signal.SIGSTOP)
    finally:
        agent.signal(signal.SIGCONT)
    try:
        await knows_that_it_runs(fleet.host(there), migration)
        await asyncio.to_thread(fleet.power_off, there)
    finally:
        etcd.signal(signal.SIGCONT)
    await asyncio.to_thread(fleet.up)
    migration = await moves.ends(migration.id)
    assert (state_of(migration), migration.error) == (State.DONE, ""), story(migration)
    assert (migration.loss.host, migration.loss.certain) == (there, True)
    assert migration.loss.reason == f"{subject.name} ran on {there}, and its QEMU ended there"
    guest = await moves.guest(subject.name)
    assert (guest.owner.host, guest.loss.reason) == (there, migration.loss.reason)
    seen = await asyncio.to_thread(Guests(fleet).find, subject.name)
    assert [one for one in seen if one.state == "running" or one.host == here] == []
