"""The disks of a guest that comes: images that are made here, and exported to the source until the guest runs.

prepare       images made, exported; the XML names them
              (the source mirrors into them)
before_run    the exports are closed: the images are the guest's own
running       what they still lack is pulled from the source
undo          no export, no image, no pull
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

from handoff.agent.v1 import disk_pb2 as pb
from handoff_agent.companions import DestinationCompanion
from handoff_agent.disks import images
from handoff_agent.disks.moves import moves_of, recorded
from handoff_agent.disks.plan import MOVED, PULL
from handoff_agent.disks.pull import Pull
from handoff_agent.disks.rewrite import with_disks
from handoff_agent.disks.settings import StorageSettings
from handoff_agent.disks.storage_daemon import Export, StorageDaemon, find_binary
from handoff_agent.domains import undefine
from handoff_agent.guests import parse_domain
from handoff_agent.handoff import Handoff
from handoff_agent.slots import Slot
from handoff_common.errors import PreconditionError

FLUSH_INTERVAL_S: Final = 1.0


class ArrivingDisks(DestinationCompanion):
    """The disks of one guest that comes."""

    def __init__(self, handoff: Handoff, slot: Slot, settings: StorageSettings, threads: ThreadPoolExecutor) -> None:
        self._handoff = handoff
        self._slot = slot
        self._flushing: asyncio.Task[None] | None = None
        self._pulling: asyncio.Task[None] | None = None
        self._settings = settings
        self._threads = threads
        self._daemon = StorageDaemon(settings.folder / handoff.record.migration_id / "images", threads)

    async def prepare(self, xml: str) -> str:
        """Makes the images and exports them. Raises PreconditionError or ExhaustedError."""
        moves = moves_of(self._handoff.record)
        moved = [move for move in moves if move.strategy in MOVED]
        if not moved:
            return xml
        for move in moved:
            if move.strategy == PULL and not move.base_uri:
                raise PreconditionError(f"disk {move.target}: its source does not give what it holds; try without fast")
            await self._make(move)
        binary = find_binary(parse_domain(xml).findtext("devices/emulator", "").strip())
        exports = [Export(self._name(move), move.path, move.format, writable=True) for move in moved]
        uris = await self._daemon.start(
            binary, exports, self._settings.address, tls_credentials=self._settings.tls_credentials
        )
        for move in moved:
            move.uri = uris[self._name(move)]
        await self._handoff.change(disks=recorded(moves))
        self._flushing = asyncio.create_task(self._keep_flushed([move.path for move in moved]))
        return with_disks(xml, moves, running=True)

    async def before_run(self) -> None:
        """Closes the exports; the locks of the images are free on return."""
        self._stop_flushing()
        await self._daemon.stop()

    async def running(self) -> None:
        """Begins to pull, and keeps the definition meanwhile: the guest may be shut down and started again."""
        if not self._handoff.record.pulling or self._pulling is not None:
            return
        if xml := self._handoff.record.persistent_xml:
            await self._slot.call(lambda connection: connection.defineXML(xml))
        self._pulling = asyncio.create_task(self._pull(), name=f"pull-{self._handoff.record.migration_id}")

    async def detach(self) -> None:
        """QEMU goes on with a pull; the next agent finds it again."""
        self._stop_flushing()
        await self._stop_pulling()

    async def finalize(self) -> None:
        """The images are the guest's: nothing of them is ours to remove, or to pull, any more."""
        await self._stop_pulling()
        await self._daemon.stop()
        for move in self._moved():
            await self._blocking(partial(images.remove, self._mark(move)))

    async def undo(self) -> None:
        """Closes the exports and removes the images that were made; and the definition, if the guest ran here."""
        self._stop_flushing()
        await self._stop_pulling()
        if self._handoff.record.pulling and self._handoff.record.activating:
            await undefine(self._slot, self._handoff.record.domain_uuid)
        await self._daemon.stop()
        for move in self._moved():
            await self._blocking(partial(images.remove_marked, self._mark(move), move.path))

    async def _keep_flushed(self, paths: Sequence[str]) -> None:
        """QEMU flushes the copies in the pause: what is on disk by then makes it shorter."""
        while True:
            await asyncio.sleep(FLUSH_INTERVAL_S)
            for path in paths:
                with contextlib.suppress(OSError):
                    await asyncio.to_thread(images.flush, path)

    def _stop_flushing(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None

    async def _stop_pulling(self) -> None:
        if self._pulling is not None:
            self._pulling.cancel()
            await asyncio.gather(self._pulling, return_exceptions=True)

    async def _pull(self) -> None:
        record = self._handoff.record
        readings: dict[str, pb.DiskProgress] = {}

        def report(reading: pb.DiskProgress) -> None:
            readings[reading.target] = reading
            self._handoff.disk_progress = tuple(readings.values())

        for move in moves_of(record):
            if move.strategy == PULL:
                await Pull(self._slot, record.domain_uuid, move, record.bandwidth_bytes_per_s, self._handoff.log).run(
                    report
                )
        await self._handoff.change(pulling=False)
        self._handoff.log.info("disks are complete here")

    async def _make(self, move: pb.DiskMove) -> None:
        mark = self._mark(move)
        create = partial(
            images.create,
            mark,
            move.format,
            move.virtual_size_bytes,
            owner=self._settings.owner,
            cluster_bytes=move.cluster_bytes,
            base_uri=move.base_uri,
        )
        await self._blocking(create)
        await self._blocking(partial(images.give_name, mark, move.path))

    def _moved(self) -> Sequence[pb.DiskMove]:
        return [move for move in moves_of(self._handoff.record) if move.strategy in MOVED]

    def _mark(self, move: pb.DiskMove) -> str:
        return images.mark_of(move.path, self._handoff.record.migration_id, move.target)

    def _name(self, move: pb.DiskMove) -> str:
        return f"{self._handoff.record.migration_id}-{move.target}"

    async def _blocking(self, work: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._threads, work)
