"""What the tests of tenants' networks share: what a host makes of a port, its flows, and datagrams to a guest."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from moves import CALL_S, Subject, order_held_up, story

from handoff.agent.v1.flow_pb2 import GetNetworkRequest, GetNetworkResponse
from handoff.agent.v1.flow_pb2_grpc import FlowServiceStub
from handoff.agent.v1.qemu_pb2 import HandoffRole, HandoffState
from handoff.controller.v1.migrations_pb2 import Migration
from handoff_common.channel import open_channel
from handoff_controller.machine import State, state_of
from handoff_lab.fleet import Fleet
from handoff_lab.networks import RED
from handoff_lab.probe import UdpProbe
from soak.clients import AgentSide

OURS = "cookie=0x48ff000000000000/0xffff000000000000"
INTERVAL_MS = 4
HELD = frozenset({HandoffState.HANDOFF_STATE_HELD})


async def network_of(fleet: Fleet, host: str) -> GetNetworkResponse:
    async with open_channel(f"unix:{fleet.lab.agent_socket(host)}") as channel:
        answer: GetNetworkResponse = await FlowServiceStub(channel).GetNetwork(GetNetworkRequest(), timeout=CALL_S)
        return answer


async def place_on(fleet: Fleet, host: str, mac: str) -> tuple[str, int]:
    """Where a host sends frames for a MAC of tenant red, and what a handoff makes of its port there."""
    ports = (await network_of(fleet, host)).ports
    [view] = [view for view in ports if (view.port.mac, view.port.tunnel) == (mac, RED.tunnel)]
    return view.frames_go_to, view.handoff


async def tap_of(fleet: Fleet, host: str, mac: str) -> str:
    """The interface of a port of tenant red; empty as long as the host does not know it."""
    ports = (await network_of(fleet, host)).ports
    return next((view.interface for view in ports if (view.port.mac, view.port.tunnel) == (mac, RED.tunnel)), "")


async def ovs(fleet: Fleet, host: str, *command: str) -> str:
    return (await asyncio.to_thread(fleet.node(host).run, list(command))).stdout


@asynccontextmanager
async def probed(subject: Subject, *nodes: str, interval_ms: int = INTERVAL_MS) -> AsyncIterator[list[UdpProbe]]:
    """Datagrams from all of these nodes. As many as busy cores can carry: the bench sends one each millisecond."""
    fleet = subject.fleet
    probes = [
        UdpProbe(fleet.lab, fleet.node(node), subject.record.ip, interval_ms * 1000, interface=RED.interface)
        for node in nodes
    ]
    try:
        for probe in probes:
            await probe.__aenter__()
        yield probes
    finally:
        for probe in probes:
            await probe.stop()


@asynccontextmanager
async def held(subject: Subject, there: str) -> AsyncIterator[Migration]:
    """A migration that has all of its guest at the destination, and is committed when this ends."""
    here, etcd = await subject.host(), subject.fleet.daemon("etcd1", "etcd")
    try:
        async with order_held_up(subject, there) as migration:
            etcd.signal(signal.SIGSTOP)
        await AgentSide(subject.fleet.lab, here).reaches(migration.id, HandoffRole.HANDOFF_ROLE_SOURCE, HELD)
        yield migration
    finally:
        etcd.signal(signal.SIGCONT)


async def ended(subject: Subject, migration_id: str) -> Migration:
    migration = await subject.moves.ends(migration_id)
    assert state_of(migration) is State.DONE, story(migration)
    assert list(migration.warnings) == []
    return migration


def must_be_whole(probes: list[UdpProbe]) -> None:
    for result in map(UdpProbe.result, probes):
        print(f"gap {result.longest_gap_ms:.0f} ms, {result.sent} sent, mean {result.mean_ms:.1f} ms")
        assert (result.lost, result.duplicated) == (0, 0), result
