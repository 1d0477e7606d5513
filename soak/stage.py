"""A fleet for as many cells as one likes: each begins on a healthy one, whatever the one before has done."""

import asyncio
from types import TracebackType
from typing import Self

import grpc.aio

from handoff_lab.errors import LabError
from handoff_lab.fleet import Fleet
from soak.care import controller_names, found_fleet, mend, renew, wait_healthy
from soak.cell_run import Result, run_cell
from soak.cells import Cell
from soak.clients import Controllers
from soak.scene import Scene


class Stage:
    """Use it as a context: it founds the fleet. Taking that down is left to its owner."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._controllers: Controllers | None = None
        self._scene: Scene | None = None

    async def __aenter__(self) -> Self:
        guest = await asyncio.to_thread(found_fleet, self._fleet)
        self._controllers = Controllers(self._fleet.lab, controller_names())
        self._scene = Scene(self._fleet, self._controllers, guest)
        await wait_healthy(self._scene)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._controllers is not None
        await self._controllers.close()

    async def run(self, cell: Cell) -> Result:
        """Runs a cell, and mends the fleet; it is founded anew, and the cell broken, when that is not enough."""
        assert self._scene is not None
        result = await run_cell(self._scene, cell)
        try:
            await mend(self._scene)
        except (LabError, OSError, TimeoutError, grpc.aio.AioRpcError) as error:
            result.problems.append(f"a new fleet was needed: {error}")
            result.ok = False
            self._scene = await renew(self._scene)
        return result
