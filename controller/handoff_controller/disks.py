"""The disks of a guest that has moved: as long as its destination pulls some, the source's are needed."""

import asyncio
from contextlib import aclosing
from functools import partial
from typing import Final

from handoff.agent.v1.disk_pb2 import DiskStrategy
from handoff.agent.v1.qemu_pb2 import Handoff
from handoff.controller.v1.migrations_pb2 import Migration
from handoff_common.errors import UnavailableError
from handoff_controller.journey import DESTINATION, Journey, StepFailed

PROGRESS_INTERVAL_S: Final = 1.0
# A destination that is silent for longer is worth a warning; the wait goes on.
PATIENCE_S: Final = 10.0


class ArrivingDisks:
    """Waits until the destination has all."""

    def __init__(self, way: Journey) -> None:
        self._way = way
        self._all_there = asyncio.Event()

    async def arrive(self) -> None:
        """Waits for as long as it takes: there is no way back. What is in the way becomes a warning in the record."""
        while any(move.strategy == DiskStrategy.DISK_STRATEGY_PULL for move in self._way.migration.disks):
            try:
                await self._way.insist(self._pulled, PATIENCE_S, also_refusals=True)
                break
            except StepFailed as failure:
                sentence = f"{self._way.at_destination} does not tell how far its disks are: {failure}"
                self._way.log.warning("disks", error=sentence)
                await self._way.note(partial(_warn, text=sentence))
        self._all_there.set()

    async def wait(self) -> None:
        """Returns once nothing of the source's disks is needed any more."""
        await self._all_there.wait()

    async def _pulled(self) -> Handoff:
        """Follows the destination until it needs nothing of the source. Raises as the watch does."""
        loop = asyncio.get_running_loop()
        published_at = 0.0
        async with aclosing(self._way.destination.watch(self._way.migration.id, DESTINATION)) as states:
            async for handoff in states:
                if not handoff.pulling:
                    return handoff
                if loop.time() - published_at > PROGRESS_INTERVAL_S:
                    published_at = loop.time()
                    await self._way.records.put_progress(self._way.migration.id, handoff.progress)
        raise UnavailableError("its agent ended the watch")


def _warn(migration: Migration, text: str) -> None:
    if text not in migration.warnings:
        migration.warnings.append(text)
