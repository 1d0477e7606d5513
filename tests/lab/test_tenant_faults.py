"""The worst moments of a switch, as a tenant notices them: where the guest runs, and whether its traffic is there."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
from moves import FAST, OBSERVER, Moves, Subject, order_held_up, qemu_on, story
from tenants import INTERVAL_MS, OURS, ended, held, network_of, ovs, place_on, probed

from handoff.agent.v1.flow_pb2 import PortHandoff
from handoff.controller.v1.migrations_pb2 import Migration, MigrationOptions
from handoff_controller.machine import State, state_of
from handoff_lab.fleet import Fleet
from handoff_lab.gateway import NAME as GATEWAY
from handoff_lab.guest import Guests
from handoff_lab.networks import RED
from handoff_lab.probe import TcpSession
from soak.clients import AgentSide

pytestmark = pytest.mark.lab

HOSTS = ("h1", "h2", "h3")
SWITCH_DEADLINE_S = 2
SLACK_S = 1
SETTLES_S = 15
BESIDE_S = 0.1
SLOWER = MigrationOptions(bandwidth_bytes_per_s=24 << 20)


async def flows_on(fleet: Fleet, host: str) -> set[str]:
    """The cookies of our flows: digests of what they are."""
    lines = await ovs(fleet, host, "ovs-ofctl", "-O", "OpenFlow14", "dump-flows", "br-int", OURS)
    return {line.partition("cookie=")[2].partition(",")[0] for line in lines.splitlines() if "cookie=" in line}


async def no_move_is_left(fleet: Fleet) -> None:
    """Waits until no host knows of a guest that moves, and each switch has the flows that its agent wants."""
    problems = ["not looked yet"]
    until = asyncio.get_running_loop().time() + SETTLES_S
    while problems:
        assert asyncio.get_running_loop().time() < until, problems
        problems = []
        for host in HOSTS:
            network, flows = await asyncio.gather(network_of(fleet, host), flows_on(fleet, host))
            moving = [f"{view.port.mac} {view.handoff}" for view in network.ports if view.handoff]
            problems += [f"{host}: {each}" for each in (*moving, network.message) if each]
            if len(flows) != network.flows:
                problems.append(f"{host}: {len(flows)} flows, not {network.flows}")
        await asyncio.sleep(0.1)


@asynccontextmanager
async def paused_at_its_source(subject: Subject, there: str) -> AsyncIterator[Migration]:
    """A migration whose guest is paused, and whose stream goes to a QEMU that stands still until this ends."""
    here = await subject.host()
    async with order_held_up(subject, there) as migration:
        destination = await asyncio.to_thread(qemu_on, subject.fleet, there, subject.name)
        os.kill(destination, signal.SIGSTOP)
    try:
        await AgentSide(subject.fleet.lab, here).pauses(subject.record.uuid)
        yield migration
    finally:
        os.kill(destination, signal.SIGCONT)


async def test_a_link_that_is_cut_in_the_pause_gives_the_guest_back_with_its_frames(
    tenant: Subject, fleet: Fleet
) -> None:
    before = {host: await flows_on(fleet, host) for host in HOSTS}
    cut = partial(fleet.fabric.keep_apart, "h1", "h2")
    try:
        async with (
            TcpSession(fleet.node(OBSERVER), tenant.record.ip, interface=RED.interface) as session,
            probed(tenant, OBSERVER) as probes,
        ):
            async with paused_at_its_source(tenant, "h2") as migration:
                await asyncio.to_thread(cut, apart=True)
            migration = await tenant.moves.ends(migration.id)
            heard = session.counters
            async with asyncio.timeout(SWITCH_DEADLINE_S + SLACK_S):
                while session.counters == heard:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        assert state_of(migration) is State.ABORTED, story(migration)
    finally:
        await asyncio.to_thread(cut, apart=False)
    result = probes[0].result()
    print(f"pause {migration.outcome.downtime_ms:.0f} ms, gap {result.longest_gap_ms:.0f} ms, lost {result.lost}")
    assert result.longest_gap_ms < 1000 * (SWITCH_DEADLINE_S + SLACK_S)
    assert result.duplicated == 0
    assert session.result().survived, session.result()
    await tenant.must_be_at("h1")
    await no_move_is_left(fleet)
    assert {host: await flows_on(fleet, host) for host in HOSTS} == before


async def test_a_switch_that_dies_at_the_destination_in_the_pause_costs_nothing_but_time(
    tenant: Subject, fleet: Fleet
) -> None:
    """It starts again at once: the guest goes on at one of both, with its traffic."""
    async with (
        TcpSession(fleet.node(OBSERVER), tenant.record.ip, interface=RED.interface) as session,
        probed(tenant, OBSERVER) as probes,
    ):
        async with paused_at_its_source(tenant, "h2") as migration:
            await asyncio.to_thread(fleet.daemon("h2", "ovs-vswitchd").signal, signal.SIGKILL)
            await asyncio.to_thread(fleet.host("h2").restart, "ovs-vswitchd")
        migration = await tenant.moves.ends(migration.id)
        home = "h2" if state_of(migration) is State.DONE else "h1"
        await tenant.must_be_at(home)
        await no_move_is_left(fleet)
    await must_have_its_traffic(tenant, home, session)
    result = probes[0].result()
    print(story(migration), f"gap {result.longest_gap_ms:.0f} ms, lost {result.lost}")
    assert result.duplicated == 0


async def test_a_switch_that_is_dead_at_the_commit_has_the_guests_frames_once_it_is_back(
    tenant: Subject, fleet: Fleet
) -> None:
    async with (
        TcpSession(fleet.node(OBSERVER), tenant.record.ip, interface=RED.interface) as session,
        probed(tenant, OBSERVER) as probes,
    ):
        async with held(tenant, "h2") as migration:
            await asyncio.to_thread(fleet.daemon("h2", "ovs-vswitchd").signal, signal.SIGKILL)
        await tenant.moves.reaches(migration.id, State.COMMITTED)
        await asyncio.sleep(0.5)
        await asyncio.to_thread(fleet.host("h2").restart, "ovs-vswitchd")
        back = time.time()
        migration = await tenant.moves.ends(migration.id)
        assert state_of(migration) is State.DONE, story(migration)
        await tenant.must_be_at("h2")
        await no_move_is_left(fleet)
    await must_have_its_traffic(tenant, "h2", session)
    gap = probes[0].result().longest_gap
    after_s = gap.began_at_s + gap.length_ms / 1000 - back
    print(story(migration), f"traffic is back {after_s:.2f} s after the switch; lost {probes[0].result().lost}")
    assert after_s < SWITCH_DEADLINE_S
    assert probes[0].result().duplicated == 0


async def must_have_its_traffic(subject: Subject, home: str, session: TcpSession) -> None:
    assert session.result().survived, session.result()
    assert session.result().longest_silence_ms < 10_000
    for host in HOSTS:
        place, handoff = await place_on(subject.fleet, host, subject.record.mac)
        assert handoff == PortHandoff.PORT_HANDOFF_UNSPECIFIED
        assert place.startswith("vnet") if host == home else place == f"10.21.0.{home[1]}", (host, place)


async def test_two_guests_of_a_tenant_that_move_at_one_time_lose_nothing(
    tenant: Subject, moves: Moves, guests: Guests, fleet: Fleet
) -> None:
    """One comes to h1 while the other leaves it."""
    other = await Subject.create(moves, "red-2", OBSERVER, disks=(), network=RED.name)
    assert await other.host() == OBSERVER
    async with (
        TcpSession(fleet.node(GATEWAY), tenant.record.ip, interface=RED.interface) as of_tenant,
        TcpSession(fleet.node(GATEWAY), other.record.ip, interface=RED.interface) as of_other,
        probed(tenant, GATEWAY, OBSERVER) as to_tenant,
        probed(other, GATEWAY, "h2") as to_other,
    ):
        # Not with both pauses at once: a userspace bridge may lose anybody's frame when a tap is plugged or unplugged.
        created = await asyncio.gather(moves.create(tenant.name, "h2", FAST), moves.create(other.name, "h1", SLOWER))
        done = await asyncio.gather(ended(tenant, created[0].id), ended(other, created[1].id))
    begins, ends = zip(*(_copied(migration) for migration in done), strict=True)
    assert max(begins) < min(ends), "they did not move at one time"
    for migration, probes in zip(done, (to_tenant, to_other), strict=True):
        paused_s = migration.outcome.paused_time.ToNanoseconds() / 1e9
        ran_s = paused_s + migration.outcome.downtime_ms / 1000
        for result in (probe.result() for probe in probes):
            after_pause_ms = [round(1000 * (sent_s - paused_s)) for sent_s in result.unanswered]
            pause_ms = migration.outcome.downtime_ms
            print(f"pause {pause_ms:.0f}, gap {result.longest_gap_ms:.0f} ms, of {result.sent} lost {after_pause_ms}")
        for result in (probe.result() for probe in probes):
            assert result.duplicated == 0
            assert [sent_s for sent_s in result.unanswered if paused_s - BESIDE_S < sent_s < ran_s + BESIDE_S] == []
            assert result.lost * INTERVAL_MS < 1000 * BESIDE_S
    for session in (of_tenant, of_other):
        assert session.result().survived, session.result()
    await asyncio.gather(tenant.must_be_at("h2"), other.must_be_at("h1"))
    await no_move_is_left(fleet)


def _copied(migration: Migration) -> tuple[int, int]:
    """When its copy began, and when it was over."""
    times = {change.state: change.time.ToNanoseconds() for change in migration.timeline}
    return times[State.COPYING.value], times[State.DONE.value]
