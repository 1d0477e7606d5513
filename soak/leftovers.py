"""What a migration may leave behind, looked for on both of its hosts, and of the network also where the observer is."""

import asyncio
from typing import Final

import grpc.aio

from handoff.agent.v1.qemu_pb2 import HandoffState
from handoff_controller.settle import SETTLED
from handoff_lab.fabric import OVERLAY_NET
from handoff_lab.guest import Sighting
from handoff_lab.host import SLOTS, Host
from soak import disks, flows
from soak.scene import OBSERVER, Scene, qemus

LOOK_AGAIN_S: Final = 0.3


async def leftovers(scene: Scene, home: str | None) -> list[str]:
    """All that is there and should not be, when the guest's home is `home`; None: it is nowhere."""
    sightings = await asyncio.to_thread(scene.guests.sightings)
    keepers = {home} if home is not None else {seen.host for seen in _of(scene, sightings)}
    found = _domains(scene, sightings, home)
    for host in scene.hosts():
        running = sum(seen.host == host.name and seen.state == "running" for seen in sightings)
        looks = await asyncio.gather(
            asyncio.to_thread(_processes, scene, host, home),
            asyncio.to_thread(_streams, host),
            asyncio.to_thread(_ports, host, running),
            asyncio.to_thread(_files, scene, host, home),
            asyncio.to_thread(disks.left, scene, host, keepers),
        )
        found += [f"{host.name}: {left}" for look in looks for left in look]
    if scene.local_disks:
        for seen in _of(scene, sightings):
            if seen.state == "running":
                found += [f"{seen.host}: {left}" for left in await asyncio.to_thread(disks.jobs_left, scene, seen)]
    for name in (*scene.lane.hosts, OBSERVER):
        found += [f"{name}: {left}" for left in await flows.left(scene, name, home)]
    for name in scene.lane.hosts:
        found += await _handoffs(scene, name)
    return found


def _of(scene: Scene, sightings: list[Sighting]) -> list[Sighting]:
    return [seen for seen in sightings if seen.guest == scene.guest.name]


def _domains(scene: Scene, sightings: list[Sighting], home: str | None) -> list[str]:
    found = []
    for seen in _of(scene, sightings):
        if seen.state == "shut off" and home is None:
            continue
        if seen.host != home or seen.state != "running":
            found.append(f"{seen.host}/{seen.slot}: the guest is {seen.state}")
    return found


def _processes(scene: Scene, host: Host, home: str | None) -> list[str]:
    expected = 1 if host.name == home else 0
    pids = qemus(host, scene.guest.name)
    return [] if len(pids) == expected else [f"{len(pids)} QEMU processes of the guest, {pids}"]


def _streams(host: Host) -> list[str]:
    """Sockets of migration streams and exports; by address, for their ports are ordinary ephemeral ports too."""
    lines = host.node.run(["ss", "-Htanp"]).stdout.splitlines()
    fields = [line.split() for line in lines]
    return [" ".join(row) for row in fields if row[0] != "TIME-WAIT" and row[3].startswith(f"{OVERLAY_NET}.")]


def _ports(host: Host, running: int) -> list[str]:
    ports = host.node.run(["ovs-vsctl", "list-ports", "br-int"]).stdout.split()
    taps = [port for port in ports if port.startswith("vnet")]
    return [f"switch ports {taps} for {running} guests"] if len(taps) > running else []


def _files(scene: Scene, host: Host, home: str | None) -> list[str]:
    """Sockets, pid files and directories of a QEMU that is gone."""
    if host.name == home:
        return []
    found = []
    for slot in SLOTS:
        folder = host.directory / "run/handoff/slots" / slot / "qemu"
        found += [str(path.relative_to(host.directory)) for path in folder.glob(f"{scene.guest.name}.*")]
    return found


async def _handoffs(scene: Scene, host: str) -> list[str]:
    try:
        handoffs = await scene.agent(host).handoffs()
    except grpc.aio.AioRpcError as error:
        return [f"{host}: its agent does not answer: {error.details()}"]
    return [
        f"{host}: handoff {one.migration_id} is {HandoffState.Name(one.state)}"
        for one in handoffs
        if one.state not in SETTLED
    ]


async def none_left(scene: Scene, home: str | None, deadline_s: float) -> list[str]:
    """Waits until nothing is left; returns what is at the deadline."""
    loop = asyncio.get_running_loop()
    until = loop.time() + deadline_s
    while True:
        found = await leftovers(scene, home)
        if not found or loop.time() > until:
            return found
        await asyncio.sleep(LOOK_AGAIN_S)
