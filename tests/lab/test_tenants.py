"""Guests of tenants on the real fleet: who may reaches them, and no frame is lost or doubled as they move."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from moves import OBSERVER, Moves, Subject, qemu_on, story
from tenants import INTERVAL_MS, OURS, ended, held, must_be_whole, ovs, place_on, probed, tap_of
from test_upgrade import upgrade

from handoff.agent.v1.flow_pb2 import PortHandoff
from handoff.controller.v1.migrations_pb2 import MigrationOptions
from handoff_controller.machine import State, state_of
from handoff_lab.fleet import Fleet
from handoff_lab.gateway import NAME as GATEWAY
from handoff_lab.guest import Guests
from handoff_lab.netns import NetNamespace
from handoff_lab.networks import BLUE, RED, TENANT
from handoff_lab.probe import ECHO_PORT, TcpSession, UdpProbe

pytestmark = pytest.mark.lab

SWITCH_DEADLINE_S = 1
TRIES = 30
BESIDE_S = 0.1
STANDSTILL_S = 0.3
ALL_PROTOCOLS = 3
LOUD_S = 0.005


async def answers(fleet: Fleet, host: str, address: str, interface: str, source: str = "") -> bool:
    """Whether the guest's echo answers a datagram that leaves by an interface, from an address.

    Three seconds: ARP may need a second try, on both sides of a tunnel.
    """

    def ask() -> bool:
        with (
            NetNamespace.of(fleet.node(host)) as network,
            network.socket(kind=socket.SOCK_DGRAM, interface=interface) as client,
        ):
            if source:
                client.bind((source, 0))
            client.settimeout(0.1)
            for _ in range(TRIES):
                try:
                    client.sendto(bytes(24), (address, ECHO_PORT))
                    client.recv(100)
                except OSError:  # nothing came, or nobody answers for the address
                    continue
                return True
            return False

    return await asyncio.to_thread(ask)


async def test_no_frame_is_lost_or_doubled_when_a_guest_moves(tenant: Subject, fleet: Fleet) -> None:
    """There and back, and to the other slot; seen from another host, and from outside of the fleet."""
    mac = tenant.record.mac
    async with TcpSession(fleet.node(OBSERVER), tenant.record.ip) as session:
        for destination in ("h2", "h1"):
            async with probed(tenant, OBSERVER, GATEWAY) as probes:
                await ended(tenant, (await tenant.moves.create(tenant.name, destination)).id)
            must_be_whole(probes)
            await tenant.must_be_at(destination)
            away = "h1" if destination == "h2" else "h2"
            assert await place_on(fleet, away, mac) == (f"10.21.0.{destination[1]}", 0)
            assert await place_on(fleet, OBSERVER, mac) == (f"10.21.0.{destination[1]}", 0)
            tap, handoff = await place_on(fleet, destination, mac)
            assert tap.startswith("vnet")
            assert handoff == PortHandoff.PORT_HANDOFF_UNSPECIFIED
        async with probed(tenant, OBSERVER) as probes:
            migration = await ended(tenant, (await upgrade(tenant, "10.0-rebuilt")).id)
        # A userspace bridge may lose a frame of anybody's when a tap is plugged in, half a second before the switch.
        paused_s = migration.outcome.paused_time.ToNanoseconds() / 1e9
        ran_s = paused_s + migration.outcome.downtime_ms / 1000
        for result in map(UdpProbe.result, probes):
            assert result.duplicated == 0
            assert [sent_s for sent_s in result.unanswered if paused_s - BESIDE_S < sent_s < ran_s + BESIDE_S] == []
    assert session.result().survived, session.result()


async def test_tenants_are_apart_and_nobody_is_somebody_else(
    tenant: Subject, moves: Moves, guests: Guests, fleet: Fleet
) -> None:
    # Tenants have the same addresses: one of the two red ones is nobody's in blue.
    blue = await asyncio.to_thread(guests.create, "blue-1", "h1", 128, disks=(), network=BLUE.name)
    other = await asyncio.to_thread(guests.create, "red-2", "h1", 128, disks=(), network=RED.name)
    address = tenant.record.ip
    assert blue.ip != other.ip
    assert await answers(fleet, "h1", address, RED.interface)
    assert await answers(fleet, OBSERVER, address, RED.interface)
    assert await answers(fleet, GATEWAY, address, RED.interface)
    assert await answers(fleet, OBSERVER, blue.ip, BLUE.interface)
    for host in ("h1", OBSERVER, GATEWAY):
        assert await answers(fleet, host, other.ip, RED.interface)
        assert not await answers(fleet, host, other.ip, BLUE.interface), f"{host} reached red from blue"
    dropped = await forged(fleet, OBSERVER)
    await ovs(fleet, OBSERVER, "ip", "address", "add", f"{RED.prefix}.77/32", "dev", RED.interface)
    try:
        assert not await answers(fleet, OBSERVER, address, RED.interface, source=f"{RED.prefix}.77")
    finally:
        await ovs(fleet, OBSERVER, "ip", "address", "del", f"{RED.prefix}.77/32", "dev", RED.interface)
    assert await forged(fleet, OBSERVER) >= dropped + TRIES


async def forged(fleet: Fleet, host: str) -> int:
    """How many frames the guard has dropped."""
    lines = await ovs(fleet, host, "ovs-ofctl", "-O", "OpenFlow14", "dump-flows", "br-int", f"table=200,{OURS}")
    [last] = [line for line in lines.splitlines() if "priority=0 actions=drop" in line]
    return int(last.partition("n_packets=")[2].partition(",")[0])


@dataclass
class SiteTraffic:
    """What the site's own network sends to everybody, and what of a guest's it gets to see."""

    sent: int = 0
    sources: set[str] = field(default_factory=set)

    async def run(self, wire: socket.socket) -> None:
        everybody = bytes.fromhex("ffffffffffff02000000ffff88b5").ljust(60, b"\0")
        while True:
            await asyncio.sleep(LOUD_S)
            wire.send(everybody)
            self.sent += 1
            try:
                while frame := wire.recv(2000):
                    self.sources.add(frame[6:12].hex(":"))
            except BlockingIOError:
                continue


@asynccontextmanager
async def loud_site(fleet: Fleet, host: str) -> AsyncIterator[SiteTraffic]:
    """Broadcasts into the site's network of a host, which hears all that NORMAL floods."""
    with (
        NetNamespace.of(fleet.node(host)) as network,
        network.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire,
    ):
        wire.bind((TENANT.interface, ALL_PROTOCOLS))
        wire.setblocking(False)
        traffic = SiteTraffic()
        running = asyncio.create_task(traffic.run(wire))
        try:
            yield traffic
        finally:
            running.cancel()
            await asyncio.wait({running})


async def test_a_new_guest_is_its_tenants_before_it_runs_and_whoever_leads(
    guests: Guests, moves: Moves, fleet: Fleet
) -> None:
    """No leader has told of it: its definition has. It hears nothing of the site, and the site nothing of it."""
    controllers = [fleet.daemon(name, "controller") for name in moves.controllers]
    async with loud_site(fleet, "h1") as traffic:
        for controller in controllers:
            controller.signal(signal.SIGSTOP)
        try:
            record = await asyncio.to_thread(
                guests.create, "red-new", "h1", 128, disks=(), network=RED.name, wait=False
            )
            async with asyncio.timeout(SWITCH_DEADLINE_S):
                while not (tap := await tap_of(fleet, "h1", record.mac)):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        finally:
            for controller in controllers:
                controller.signal(signal.SIGCONT)
        sent = traffic.sent
        await asyncio.to_thread(guests.wait_booted, record)
        read = int(await ovs(fleet, "h1", "cat", f"/sys/class/net/{tap}/statistics/tx_packets"))
        await asyncio.to_thread(guests.wait_ready, record)
        assert await answers(fleet, "h1", record.ip, RED.interface)
    print(f"{sent} frames of the site's while it was created, {traffic.sent} until it answered; it read {read}")
    assert sent > 10
    assert record.mac not in traffic.sources
    assert read < 10
    assert (await moves.known("red-new")).owner.host == "h1"


async def test_an_agent_that_dies_cuts_nobody_off_and_a_switch_that_does_is_filled_again(
    tenant: Subject, fleet: Fleet
) -> None:
    await ovs(fleet, "h1", "ovs-ofctl", "add-flow", "br-int", "table=0,priority=7,in_port=777,actions=drop")
    agent = fleet.daemon("h1", "agent")
    async with probed(tenant, OBSERVER) as probes:
        await asyncio.to_thread(agent.signal, signal.SIGKILL)
        await asyncio.sleep(0.5)
        await asyncio.to_thread(agent.start)
        await asyncio.sleep(0.5)
    must_be_whole(probes)
    flows = await ovs(fleet, "h1", "ovs-ofctl", "-O", "OpenFlow14", "dump-flows", "br-int")
    assert "priority=7,in_port=777 actions=drop" in flows
    before = flows.count("cookie=0x48ff")
    async with probed(tenant, OBSERVER) as probes:
        await asyncio.to_thread(fleet.daemon("h1", "ovs-vswitchd").signal, signal.SIGKILL)
        await asyncio.to_thread(fleet.host("h1").restart, "ovs-vswitchd")
        back = time.time()
        async with asyncio.timeout(10):
            while not await answers(fleet, OBSERVER, tenant.record.ip, RED.interface):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
    outage = probes[0].result().longest_gap
    after_s = outage.began_at_s + outage.length_ms / 1000 - back
    print(f"traffic is back {after_s:.2f} s after the switch")
    assert after_s < 2
    flows = await ovs(fleet, "h1", "ovs-ofctl", "-O", "OpenFlow14", "dump-flows", "br-int", OURS)
    assert flows.count("cookie=0x48ff") == before


async def test_a_switch_that_gets_no_processor_for_a_moment_loses_nothing(tenant: Subject, fleet: Fleet) -> None:
    """Of the lab's: in user space, and no faster than its machine. What it loses would be counted as a move's."""
    switch = fleet.daemon("h1", "ovs-vswitchd")
    async with probed(tenant, OBSERVER, GATEWAY, interval_ms=1) as probes:
        await asyncio.sleep(BESIDE_S)
        switch.signal(signal.SIGSTOP)
        await asyncio.sleep(STANDSTILL_S)
        switch.signal(signal.SIGCONT)
        await asyncio.sleep(STANDSTILL_S)
    must_be_whole(probes)
    assert probes[0].result().longest_gap_ms >= STANDSTILL_S * 1000 - INTERVAL_MS


async def test_a_pause_that_is_broken_off_turns_the_frames_back(tenant: Subject, fleet: Fleet) -> None:
    """The destination's QEMU hangs in the pause: the guest runs again at its source, with its frames."""
    options = MigrationOptions(bandwidth_bytes_per_s=16 << 20)
    options.switch_deadline.FromSeconds(SWITCH_DEADLINE_S)
    async with probed(tenant, OBSERVER) as probes:
        migration = await tenant.moves.create(tenant.name, "h2", options)
        await tenant.moves.reaches(migration.id, State.COPYING)
        victim = await asyncio.to_thread(qemu_on, fleet, "h2", tenant.name)
        await tenant.moves.reaches(migration.id, State.SWITCHING)
        os.kill(victim, signal.SIGSTOP)
        migration = await tenant.moves.ends(migration.id)
    assert state_of(migration) is State.ABORTED, story(migration)
    await tenant.must_be_at("h1")
    assert (await place_on(fleet, "h1", tenant.record.mac))[0].startswith("vnet")
    assert await place_on(fleet, "h2", tenant.record.mac) == ("10.21.0.1", 0)
    result = probes[0].result()
    print(f"pause {migration.outcome.downtime_ms:.0f} ms, gap {result.longest_gap_ms:.0f} ms, lost {result.lost}")
    assert result.duplicated == 0
    assert result.longest_gap_ms < migration.outcome.downtime_ms + 300
    # What went to the destination meanwhile is lost with it.
    assert result.lost * INTERVAL_MS < result.longest_gap_ms + 100


async def test_an_agent_that_dies_in_the_pause_finds_where_the_frames_have_to_go(tenant: Subject, fleet: Fleet) -> None:
    """Held, and the commit can't be recorded: the frames wait at the destination, whatever becomes of the agent."""
    agent = fleet.daemon("h1", "agent")
    async with probed(tenant, OBSERVER) as probes:
        async with held(tenant, "h2") as migration:
            agent.signal(signal.SIGKILL)
            await asyncio.to_thread(agent.start)
            place, handoff = await place_on(fleet, "h1", tenant.record.mac)
        migration = await tenant.moves.ends(migration.id)
    assert (place, handoff) == ("10.21.0.2", PortHandoff.PORT_HANDOFF_LEAVING)
    await tenant.must_be_at("h2" if state_of(migration) is State.DONE else "h1")
    result = probes[0].result()
    print(story(migration), f"gap {result.longest_gap_ms:.0f} ms, lost {result.lost}")
    assert result.duplicated == 0
