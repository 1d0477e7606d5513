"""Keeps the fleet fit for the next cell: mends what a fault broke, and builds a new one where that is not enough."""

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import Final

import grpc.aio

from handoff.controller.v1.hosts_pb2 import HostState
from handoff_lab.errors import LabError
from handoff_lab.fleet import Fleet
from handoff_lab.guest import Guests
from handoff_lab.parallel import in_parallel
from handoff_lab.state import GuestRecord
from soak.clients import Controllers
from soak.leftovers import leftovers
from soak.scene import CONFIG, Lane, Scene, raise_fleet

MEMORY_MIB: Final = 128
DISK: Final = "size=16M,format=raw,place=shared"
HEALTHY_S: Final = 40.0


def controller_names() -> list[str]:
    """All controllers of the fleet."""
    return [f"ctl{n}" for n in range(1, CONFIG.controllers + 1)]


async def found_fleet(fleet: Fleet, controllers: Controllers, lanes: Sequence[Lane]) -> list[Scene]:
    """A fleet with a guest in each of these lanes. Nothing of an earlier one is taken over. Raises LabError."""
    await asyncio.to_thread(fleet.down)
    await asyncio.to_thread(raise_fleet, fleet)
    boots = [partial(_create, Guests(fleet), lane) for lane in lanes]
    guests = await asyncio.to_thread(in_parallel, boots)
    holding = asyncio.Lock()
    scenes = [Scene(fleet, lane, controllers, guest, holding) for lane, guest in zip(lanes, guests, strict=True)]
    for scene in scenes:
        await wait_healthy(scene)
    return scenes


async def mend(scene: Scene, *, everything: bool) -> None:
    """Mends links, daemons and the guest of a lane; with `everything` also the controllers and etcd.

    Returns when a migration could begin. Raises LabError, OSError or TimeoutError when none can.
    """
    await asyncio.to_thread(_mend_hosts, scene)
    if everything:
        await asyncio.to_thread(raise_fleet, scene.fleet)
    scene.guest = await asyncio.to_thread(_revive, scene.guests, scene.lane, scene.guest)
    await wait_healthy(scene)


def _mend_hosts(scene: Scene) -> None:
    for host in scene.hosts():
        scene.fleet.set_link(host.name, True)
        host.start_daemons(CONFIG)
    scene.fleet.fabric.keep_apart(*scene.lane.hosts, apart=False)


def _revive(guests: Guests, lane: Lane, guest: GuestRecord) -> GuestRecord:
    """Starts the guest again where it was lost; one that is in disorder is made anew."""
    states = [seen.state for seen in guests.find(guest.name)]
    if states == ["running"]:
        return guest
    if states != ["shut off"]:
        guests.delete(guest.name)
    return _create(guests, lane)


def _create(guests: Guests, lane: Lane) -> GuestRecord:
    return guests.create(lane.guest, lane.hosts[0], MEMORY_MIB, disks=(DISK, *lane.local_disks), network=lane.network)


async def wait_healthy(scene: Scene) -> None:
    """Waits until both hosts are up, the guest is known and nothing is left of any migration. Raises LabError."""
    until = time.monotonic() + HEALTHY_S
    while problems := await _ailments(scene):
        if time.monotonic() > until:
            raise LabError(f"the fleet does not recover: {'; '.join(problems)}")
        await asyncio.sleep(0.2)


async def _ailments(scene: Scene) -> list[str]:
    try:
        hosts = {host.name: host for host in await scene.controllers.hosts()}
        guest = await scene.controllers.guest(scene.guest.uuid)
    except grpc.aio.AioRpcError as error:
        return [f"the controllers do not answer: {error.details()}"]
    unknown = [f"{name} is not known" for name in scene.lane.hosts if name not in hosts]
    ours = [hosts[name] for name in scene.lane.hosts if name in hosts]
    sick = [f"{host.name}: {host.message}" for host in ours if host.state != HostState.HOST_STATE_UP]
    if unknown or sick:
        return unknown + sick
    if guest is None or guest.active_migration:
        return ["the guest is not known, or not free"]
    return await leftovers(scene, guest.owner.host)
