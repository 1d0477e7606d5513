"""A fleet for as many cells as one likes: each begins in a healthy lane, whatever the one before has done.

A fault of the controllers or etcd touches every migration: its cell has the fleet for itself, and the lanes take turns.
All others are run in two lanes at once.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Final, Self

import grpc.aio

from handoff_lab.errors import LabError
from handoff_lab.fleet import Fleet
from soak.care import controller_names, found_fleet, mend
from soak.cell_run import Result, run_cell
from soak.cells import Cell
from soak.clients import Controllers
from soak.faults import KilledTogether, Struck, Victim
from soak.scene import LANES, Lane, Scene

OF_ALL: Final = frozenset({Victim.LEADER, Victim.ETCD_FOLLOWER, Victim.ETCD_LEADER})


class Stage:
    """Use it as a context: it founds the fleet. Taking that down is left to its owner."""

    def __init__(self, fleet: Fleet, lanes: Sequence[Lane] = LANES) -> None:
        """`lanes`: those that are used."""
        self._fleet = fleet
        self._lanes = lanes
        self._controllers: Controllers | None = None
        self._scenes: list[Scene] = []
        self._beyond_help = False

    async def __aenter__(self) -> Self:
        self._controllers = Controllers(self._fleet.lab, controller_names())
        await self._found()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._controllers is not None
        await self._controllers.close()

    async def run(self, cells: Iterable[Cell], told: Callable[[Result], None], goes_on: Callable[[], bool]) -> None:
        """Runs cells; `told` hears of each result. Begins none once `goes_on` says no."""
        alone = deque(cell for cell in cells if touches_all(cell))
        others = deque(cell for cell in cells if not touches_all(cell))
        while others and goes_on():
            async with asyncio.TaskGroup() as lanes:
                for scene in self._scenes:
                    lanes.create_task(self._run_lane(scene, others, told, goes_on))
            await self._renew_if_needed()
        turns = itertools.cycle(range(len(self._scenes)))
        while alone and goes_on():
            told(await self._run_cell(self._scenes[next(turns)], alone.popleft(), everything=True))
            await self._renew_if_needed()

    async def _run_lane(
        self, scene: Scene, cells: deque[Cell], told: Callable[[Result], None], goes_on: Callable[[], bool]
    ) -> None:
        while cells and goes_on() and not self._beyond_help:
            told(await self._run_cell(scene, cells.popleft(), everything=False))

    async def _run_cell(self, scene: Scene, cell: Cell, *, everything: bool) -> Result:
        result = await run_cell(scene, cell)
        try:
            await mend(scene, everything=everything)
        except (LabError, OSError, TimeoutError, grpc.aio.AioRpcError) as error:
            result.problems.append(f"a new fleet was needed: {error}")
            result.ok = False
            self._beyond_help = True
        return result

    async def _renew_if_needed(self) -> None:
        if self._beyond_help:
            await self._found()

    async def _found(self) -> None:
        assert self._controllers is not None
        self._scenes = await found_fleet(self._fleet, self._controllers, self._lanes)
        self._beyond_help = False


def touches_all(cell: Cell) -> bool:
    """Whether its fault strikes what every migration needs."""
    match cell.fault:
        case Struck(victim, _):
            return victim in OF_ALL
        case KilledTogether(victims):
            return not OF_ALL.isdisjoint(victims)
        case _:
            return False
