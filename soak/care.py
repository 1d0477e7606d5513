"""Keeps the fleet fit for the next cell: mends what a fault broke, and builds a new one where that is not enough."""

import asyncio
import time
from typing import Final

import grpc.aio

from handoff.controller.v1.hosts_pb2 import HostState
from handoff_lab.errors import LabError
from handoff_lab.fleet import Fleet
from handoff_lab.guest import Guests
from handoff_lab.state import GuestRecord
from soak.leftovers import leftovers
from soak.scene import CONFIG, HOSTS, Scene, raise_fleet

GUEST: Final = "subject"
MEMORY_MIB: Final = 128
DISK: Final = "size=16M,format=raw,place=shared"
HEALTHY_S: Final = 40.0


def controller_names() -> list[str]:
    """All controllers of the fleet."""
    return [f"ctl{n}" for n in range(1, CONFIG.controllers + 1)]


def found_fleet(fleet: Fleet) -> GuestRecord:
    """A fleet with its guest. Nothing of an earlier one is taken over."""
    fleet.down()
    raise_fleet(fleet)
    return Guests(fleet).create(GUEST, HOSTS[0], MEMORY_MIB, disks=(DISK,))


async def mend(scene: Scene) -> None:
    """Links, daemons and the guest; returns when a migration could begin. Raises LabError or TimeoutError when not."""
    fleet = scene.fleet
    for host in HOSTS:
        await asyncio.to_thread(fleet.set_link, host, True)
    await asyncio.to_thread(fleet.fabric.keep_apart, *HOSTS, apart=False)
    await asyncio.to_thread(raise_fleet, fleet)
    scene.guest = await asyncio.to_thread(_revive, fleet, scene.guest)
    await wait_healthy(scene)


def _revive(fleet: Fleet, guest: GuestRecord) -> GuestRecord:
    """Starts the guest again where it was lost; one that is in disorder is made anew."""
    guests = Guests(fleet)
    states = [seen.state for seen in guests.find(guest.name)]
    if states == ["running"]:
        return guest
    if states != ["shut off"]:
        guests.delete(guest.name)
    return guests.create(guest.name, HOSTS[0], MEMORY_MIB, disks=(DISK,))


async def wait_healthy(scene: Scene) -> None:
    """Waits until every host is up, the guest is known and nothing is left of any migration. Raises LabError."""
    until = time.monotonic() + HEALTHY_S
    while problems := await _ailments(scene):
        if time.monotonic() > until:
            raise LabError(f"the fleet does not recover: {'; '.join(problems)}")
        await asyncio.sleep(0.2)


async def _ailments(scene: Scene) -> list[str]:
    try:
        hosts = await scene.controllers.hosts()
        guest = await scene.controllers.guest(scene.guest.uuid)
    except grpc.aio.AioRpcError as error:
        return [f"the controllers do not answer: {error.details()}"]
    sick = [f"{host.name}: {host.message}" for host in hosts if host.state != HostState.HOST_STATE_UP]
    if len(hosts) != CONFIG.hosts or sick:
        return sick or ["not every host is known"]
    if guest is None or guest.active_migration:
        return ["the guest is not known, or not free"]
    return await leftovers(scene, guest.owner.host)


async def renew(scene: Scene) -> Scene:
    """Another fleet in place of one that is beyond help."""
    guest = await asyncio.to_thread(found_fleet, scene.fleet)
    fresh = Scene(scene.fleet, scene.controllers, guest)
    await wait_healthy(fresh)
    return fresh
