"""Brings a migration to a moment and holds it there, with nothing but frozen processes.

What is frozen while a moment lasts, and what was frozen on the way to it:

    PLANNED     nothing: another guest's slow copy goes first
    PREPARING   the destination's agent, once its QEMU has been started
    COPYING     nothing: the copy is slow. Of a guest with local disks, these are on their way
    SWITCHING   etcd, from COPYING until the source is ready: the leader can't record it; then the source's agent, which
                is asked to switch and can't hear; then etcd goes on
      PAUSED    the destination's QEMU, so that the switch takes until its deadline; the source's agent goes on
      HELD      etcd again, so that the commit can't be recorded; the source's agent goes on
    COMMITTED   the destination's agent, so that the guest is not run; the source's agent goes on
    FINISHING   the source's agent, so that its copy is not released; the destination's agent goes on
    ABORTING    the destination's agent, then the cancel. Local disks are in step, and memory on its way
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

from handoff.agent.v1.disk_pb2 import DiskPhase
from handoff.agent.v1.qemu_pb2 import Handoff, HandoffRole, HandoffState
from handoff_controller.machine import State
from soak.clients import Missed
from soak.faults import Victim
from soak.moments import Moment
from soak.scene import Cast, Scene, freeze, thaw

SLOW_BYTES_PER_S: Final = 16 << 20
FAST_BYTES_PER_S: Final = 64 << 20
BLOCKER_MIB: Final = 128
BLOCKING_BYTES_PER_S: Final = 1 << 20
LEADER_HEARS_S: Final = 0.2
SOURCE: Final = HandoffRole.HANDOFF_ROLE_SOURCE
_LATER: Final = frozenset(
    {
        HandoffState.HANDOFF_STATE_HELD,
        HandoffState.HANDOFF_STATE_RELEASED,
        HandoffState.HANDOFF_STATE_FAILED,
        HandoffState.HANDOFF_STATE_ABORTED,
    }
)


def _on_their_way(handoff: Handoff) -> bool:
    disks = handoff.progress.disks
    return any(one.phase == DiskPhase.DISK_PHASE_SENDING and one.done_bytes for one in disks)


def _memory_follows(handoff: Handoff) -> bool:
    return bool(handoff.progress.ram_transferred_bytes)


class Hold:
    """One migration on its way to a moment. `reach` it, strike, `release`."""

    def __init__(self, scene: Scene, cast: Cast) -> None:
        self._scene = scene
        self._cast = cast
        self._frozen: set[int] = set()
        self.migration_id = ""
        self.destination_qemu: int | None = None
        self._blocker_id = ""

    async def reach(self, moment: Moment) -> None:
        """Creates the migration and returns when it is held at the moment. Raises Missed, LabError, AioRpcError."""
        match moment:
            case Moment.PLANNED:
                await self._planned()
            case Moment.PREPARING:
                await self._preparing()
            case Moment.COPYING:
                await self._copying(SLOW_BYTES_PER_S)
                await self._disks_are(_on_their_way)
            case Moment.ABORTING:
                await self._copying(SLOW_BYTES_PER_S)
                await self._disks_are(_memory_follows)
                self._freeze(Victim.DESTINATION_AGENT)
                await self._scene.controllers.cancel(self.migration_id)
                await self._in(State.ABORTING)
            case Moment.PAUSED:
                await self._ordered()
                await self._paused()
            case Moment.HELD:
                await self._ordered()
                self._freeze_all(self._cast.etcd_pids)
                self._thaw(Victim.SOURCE_AGENT)
                await self._source_is(HandoffState.HANDOFF_STATE_HELD)
                await asyncio.sleep(LEADER_HEARS_S)
            case Moment.COMMITTED:
                await self._committed()
            case Moment.FINISHING:
                await self._committed()
                self._freeze(Victim.SOURCE_AGENT)
                self._thaw(Victim.DESTINATION_AGENT)
                await self._in(State.FINISHING)

    async def release(self, struck: Iterable[int] = ()) -> None:
        """Lets everything go on but what was struck."""
        thaw(self._frozen - set(struck))
        self._frozen.clear()
        if self._blocker_id:
            await self._scene.controllers.cancel(self._blocker_id)

    async def end(self) -> None:
        """Waits until what helped to hold is out of the way."""
        if self._blocker_id:
            await self._scene.controllers.ends(self._blocker_id, 60)

    # Moments.

    async def _planned(self) -> None:
        controllers = self._scene.controllers
        guests, name = self._scene.guests, self._scene.lane.blocker
        await asyncio.to_thread(guests.create, name, self._cast.source, BLOCKER_MIB, disks=())
        where = await asyncio.to_thread(guests.running_on, name)
        to = self._cast.destination if where.name == self._cast.source else self._cast.source
        blocker = await controllers.create(name, to, BLOCKING_BYTES_PER_S)
        self._blocker_id = blocker.id
        await controllers.reaches(blocker.id, State.COPYING)
        await self._create(0)
        await controllers.until(self.migration_id, lambda migration: bool(migration.waiting_for), 10)

    async def _preparing(self) -> None:
        await self._create(FAST_BYTES_PER_S)
        await self._find_destination_qemu()
        self._freeze(Victim.DESTINATION_AGENT)
        await self._in(State.PREPARING)

    async def _copying(self, bandwidth_bytes_per_s: int) -> None:
        await self._create(bandwidth_bytes_per_s)
        await self._find_destination_qemu()
        await self._in(State.COPYING)
        await self._source_is(HandoffState.HANDOFF_STATE_TRANSFERRING, HandoffState.HANDOFF_STATE_READY)

    async def _ordered(self) -> None:
        await self._copying(FAST_BYTES_PER_S)
        self._freeze_all(self._cast.etcd_pids)
        await self._source_is(HandoffState.HANDOFF_STATE_READY)
        await asyncio.sleep(LEADER_HEARS_S)
        self._freeze(Victim.SOURCE_AGENT)
        self._thaw_all(self._cast.etcd_pids)
        await self._in(State.SWITCHING)
        # We may hear of the leader's write before the leader does, and it first asks the destination.
        await asyncio.sleep(LEADER_HEARS_S)

    async def _paused(self) -> None:
        assert self.destination_qemu is not None
        self._freeze_all([self.destination_qemu])
        self._thaw(Victim.SOURCE_AGENT)
        await self._scene.agent(self._cast.source).pauses(self._scene.guest.uuid)

    async def _committed(self) -> None:
        await self._ordered()
        self._freeze(Victim.DESTINATION_AGENT)
        self._thaw(Victim.SOURCE_AGENT)
        await self._in(State.COMMITTED)

    # Steps.

    async def _create(self, bandwidth_bytes_per_s: int) -> None:
        guest, controllers = self._scene.guest, self._scene.controllers
        migration = await controllers.create(guest.name, self._cast.destination, bandwidth_bytes_per_s)
        self.migration_id = migration.id

    async def _find_destination_qemu(self) -> None:
        self.destination_qemu = await self._scene.qemu(self._cast.destination, 15)

    async def _in(self, state: State) -> None:
        await self._scene.controllers.reaches(self.migration_id, state)

    async def _source_is(self, *states: "HandoffState.ValueType") -> None:
        """Waits for a state of the source's side. Raises Missed when it is past it."""
        agent = self._scene.agent(self._cast.source)
        awaited = frozenset(states)
        until = asyncio.get_running_loop().time() + 10
        while True:
            try:
                handoff = await agent.reaches(self.migration_id, SOURCE, awaited | _LATER)
            except Missed:
                # It may not have heard of the handoff yet.
                if asyncio.get_running_loop().time() > until:
                    raise
                await asyncio.sleep(0.02)
                continue
            if handoff.state not in awaited:
                raise Missed(f"the source is {HandoffState.Name(handoff.state)} already")
            return

    async def _disks_are(self, wanted: Callable[[Handoff], bool]) -> None:
        """Waits for the mirrors of the guest's local disks, if it has any. Raises Missed when the source is past it."""
        if not self._scene.local_disks:
            return
        agent = self._scene.agent(self._cast.source)
        async with asyncio.timeout(10):
            while True:
                ours = [one for one in await agent.handoffs() if one.migration_id == self.migration_id]
                if any(map(wanted, ours)):
                    return
                if any(one.state != HandoffState.HANDOFF_STATE_TRANSFERRING for one in ours):
                    raise Missed("the disks were copied before that could be seen")
                await asyncio.sleep(0.02)

    def _freeze(self, victim: Victim) -> None:
        self._freeze_all([self._cast.pids[victim]])

    def _thaw(self, victim: Victim) -> None:
        self._thaw_all([self._cast.pids[victim]])

    def _freeze_all(self, pids: Iterable[int]) -> None:
        self._frozen |= set(pids)
        freeze(pids)

    def _thaw_all(self, pids: Iterable[int]) -> None:
        self._frozen -= set(pids)
        thaw(pids)
