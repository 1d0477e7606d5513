"""The disks of a guest that leaves: mirrored into the destination's exports until the guest is paused.

leaving     a disk that will be pulled gets an overlay; its base is exported
begin       mirrors start; returns when all are in step with the guest
ordered     the guest's writes wait for the destination: nothing is left when it is paused
paused      mirrors end, complete; from here on the bases' exports are kept alive
back        mirrors end, incomplete; an overlay is folded back
released    the images are removed, no export is left
"""

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

import libvirt

from handoff.agent.v1 import disk_pb2 as pb
from handoff_agent.companions import SourceCompanion
from handoff_agent.disks import images, overlay
from handoff_agent.disks.connections import check_connection, kill_connections
from handoff_agent.disks.mirror import JobInfo, Mirror
from handoff_agent.disks.moves import moves_of, recorded
from handoff_agent.disks.nodes import disk_nodes
from handoff_agent.disks.pace import Sample, decide, rate_bytes_per_s
from handoff_agent.disks.pacing import Pacing, in_flight_bytes
from handoff_agent.disks.plan import MOVED, PULL
from handoff_agent.disks.settings import StorageSettings
from handoff_agent.disks.storage_daemon import Address, Export, StorageDaemon, find_binary
from handoff_agent.disks.uris import ExportUri, parse_uri
from handoff_agent.domains import is_active
from handoff_agent.guests import layers, parse_domain
from handoff_agent.handoff import Handoff
from handoff_agent.monitor import Json, Monitor, QmpError
from handoff_agent.slots import Slot
from handoff_agent.stream import USER_TIMEOUT_MS
from handoff_common.errors import DeadlineError, HandoffError, PreconditionError, UnavailableError

LOOK_INTERVAL_S: Final = 0.5
FIRST_LOOKS_S: Final = 0.05
SYNC_PATIENCE_S: Final = 1.0
SYNC_POLL_S: Final = 0.01
# A QEMU that waits for a dead link in its main loop does not answer before the link's connections are gone, and neither
# does libvirt: they are cut without asking it.
ANSWER_TIMEOUT_S: Final = 0.5
# As long as memory's stream is waited for.
STALL_S: Final = USER_TIMEOUT_MS / 1000
MAX_SAMPLES: Final = 2000
BASE_LOOK_S: Final = 2.0
NOT_PACED: Final = "disks are not paced: zeros count against the bandwidth"


class Urgent:
    """A guest's monitor, by the lane that is kept free for paused guests."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    async def execute(self, command: str, arguments: Mapping[str, Json] | None = None) -> Json:
        """As Monitor.execute."""
        return await self._monitor.execute(command, arguments, urgent=True)


class DepartingDisks(SourceCompanion):
    """The disks of one guest that leaves."""

    def __init__(
        self,
        handoff: Handoff,
        slot: Slot,
        settings: StorageSettings,
        threads: ThreadPoolExecutor,
        slots: Sequence[Slot] = (),
    ) -> None:
        """`slots`: all of this host; their guests' images stay."""
        self._handoff = handoff
        self._slots = slots or (slot,)
        self._slot = slot
        self._settings = settings
        self._threads = threads
        self._base = StorageDaemon(settings.folder / handoff.record.migration_id / "base", threads)
        self._monitor = Urgent(Monitor(slot, handoff.record.domain_uuid))
        self._samples: dict[str, list[Sample]] = defaultdict(list)
        self._blocking: set[str] = set()
        """Disks whose writes wait for the destination."""
        self._why_blocking: dict[str, str] = {}
        self._sharing = 0
        self._pacing = Pacing(threads)
        self._keeping: asyncio.Task[None] | None = None
        self._kept_enough = asyncio.Event()
        self._began_s = time.monotonic()

    def _moved(self) -> Sequence[pb.DiskMove]:
        return [move for move in moves_of(self._handoff.record) if move.strategy in MOVED]

    def _mirrors(self) -> Sequence[Mirror]:
        return [self._mirror(move) for move in self._moved()]

    def _mirror(self, move: pb.DiskMove) -> Mirror:
        return Mirror(self._monitor, move.target, tls_credentials=self._settings.tls_credentials)

    def _pulled(self) -> Sequence[pb.DiskMove]:
        return [move for move in moves_of(self._handoff.record) if move.strategy == PULL]

    async def leaving(self) -> None:
        """Gives disks that will be pulled their overlays, and exports what they are until now.

        What an earlier life of the agent has exported stays where it is: the destination may know.
        """
        moves = moves_of(self._handoff.record)
        pulled = [move for move in moves if move.strategy == PULL]
        if all(move.base_uri for move in pulled):
            return
        uuid, migration_id = self._handoff.record.domain_uuid, self._handoff.record.migration_id
        for move in pulled:
            move.overlay = f"{move.source}.{migration_id}"
        # On disk before it is there: an abort must find it.
        await self._handoff.change(disks=recorded(moves))
        await overlay.make(self._slot, uuid, pulled)
        xml = await self._slot.on_domain(uuid, lambda domain: domain.XMLDesc(0))
        emulator = parse_domain(xml).findtext("devices/emulator", "").strip()
        await self._export_bases(pulled, emulator, self._settings.address)
        await self._handoff.change(disks=recorded(moves))

    async def _export_bases(self, pulled: Sequence[pb.DiskMove], emulator: str, address: Address) -> None:
        names = {move.target: f"{self._handoff.record.migration_id}-{move.target}-base" for move in pulled}
        exports = [Export(names[move.target], move.source, move.source_format, writable=False) for move in pulled]
        uris = await self._base.start(
            find_binary(emulator), exports, address, tls_credentials=self._settings.tls_credentials
        )
        for move in pulled:
            move.base_uri = uris[names[move.target]]

    async def held_again(self) -> None:
        """Exports the bases again where they were, if the storage daemon has ended: with the host, perhaps."""
        self._keep_bases()

    async def detach(self) -> None:
        """The storage daemon goes on without the agent."""
        await self._stop_keeping()

    def _keep_bases(self) -> None:
        if self._keeping is None and any(move.base_uri for move in self._pulled()):
            self._kept_enough.clear()
            self._keeping = asyncio.create_task(self._keep(), name=f"base-{self._handoff.record.migration_id}")

    async def _keep(self) -> None:
        """A guest at the destination waits for what it has not pulled yet, until this host gives it again."""
        pulled = [move for move in self._pulled() if move.base_uri]
        where = parse_uri(pulled[0].base_uri)
        while not self._kept_enough.is_set():
            if self._base.pid is None:
                try:
                    await self._export_bases(pulled, "", Address(where.host, where.port, where.port))
                    self._handoff.log.info("disks are given again", port=where.port)
                except HandoffError as error:  # the address may not be up yet after a boot, or the port be taken
                    self._handoff.log.warning("disks can't be given", error=error.message)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BASE_LOOK_S):
                    await self._kept_enough.wait()

    async def _stop_keeping(self) -> None:
        """Not by a cancel: what it starts must not outlive it."""
        self._kept_enough.set()
        if self._keeping is not None:
            await asyncio.gather(self._keeping, return_exceptions=True)
            self._keeping = None

    async def begin(self) -> None:
        """Mirrors all disks until they are in step. Raises PreconditionError when one can't be, with QEMU's reason.

        A libvirtd that is away is waited for: QEMU goes on without it.
        """
        while True:
            try:
                await self._begin()
                return
            except (UnavailableError, DeadlineError) as error:
                self._handoff.log.warning("disks", error=error.message)
                await self._slot.wait_connected(LOOK_INTERVAL_S)
                await asyncio.sleep(LOOK_INTERVAL_S)

    async def _begin(self) -> None:
        moved = self._moved()
        if not moved:
            return
        self._sharing = len(moved)
        xml = await self._slot.on_domain(self._handoff.record.domain_uuid, lambda domain: domain.XMLDesc(0))
        nodes = await disk_nodes(self._monitor, parse_domain(xml))
        can_change = await self._can_change()
        rate = self._handoff.record.bandwidth_bytes_per_s
        in_flight = in_flight_bytes(rate, len(moved)) if can_change else 0
        begun = {mirror.target for mirror in self._mirrors() if await mirror.look() is not None}
        # Before others connect, whose connections have no pace yet.
        pace_was_ended = bool(in_flight and begun) and await self._pace_was_ended()
        for move in moved:
            if move.target not in nodes:
                raise PreconditionError(f"disk {move.target} is not in QEMU any more")
            if not can_change:
                self._blocking.add(move.target)
                self._why_blocking[move.target] = "this QEMU can't change it later: writes wait for the destination"
            export = parse_uri(move.uri)
            if export.tls is not bool(self._settings.tls_credentials):
                here, there = ("disk_tls", "has not") if self._settings.tls_credentials else ("no disk_tls", "has it")
                raise PreconditionError(
                    f"disk {move.target}: this host is configured with {here}, and its destination {there}; give both"
                    " hosts their credentials"
                )
            if move.target not in begun:  # a copy that runs may outlast a link that is away for a moment
                await check_connection(export)
                await self._mirror(move).connect(export)
        if pace_was_ended:
            self._handoff.log.info(NOT_PACED, why="its pace was ended before the agent was restarted")
            await self._set_speeds(rate // len(moved))
        elif in_flight:
            await self._pace()
        elif rate:
            why = "the rate is too low for it" if can_change else "this QEMU is too old for it"
            self._handoff.log.info(NOT_PACED, why=why)
        for move in moved:
            await self._mirror(move).begin(
                nodes[move.target].name,
                speed_bytes_per_s=0 if self._pacing.on else rate // len(moved),
                write_blocking=not can_change,
                top_only=move.strategy == PULL,
                in_flight_bytes=in_flight,
            )
        await self._until_in_step()

    async def _pace(self) -> None:
        """Bounds what is sent instead of what is gone through, where the kernel lets us."""
        exports, rate = self._exports(), self._handoff.record.bandwidth_bytes_per_s
        try:
            await self._pacing.begin(exports, rate)
        except OSError as error:
            self._handoff.log.warning(NOT_PACED, why=str(error))
        # Mirrors that another agent began may have the other bound.
        await self._set_speeds(0 if self._pacing.on else rate // len(exports))

    async def _pace_was_ended(self) -> bool:
        try:
            return await self._pacing.was_ended(self._exports())
        except OSError:  # whoever begins the pace meets it again, and tells
            return False

    async def _end_pace(self) -> None:
        try:
            await self._pacing.end(self._exports())
        except OSError as error:  # its mirror has failed, and tells why
            self._handoff.log.warning("pace stays", error=str(error))

    async def _back_to_speeds(self, why: str) -> None:
        """From now on QEMU bounds what is gone through: a guest's writes, which wait, don't count then."""
        self._handoff.log.info(NOT_PACED, why=why)
        await self._set_speeds(self._handoff.record.bandwidth_bytes_per_s // self._sharing)
        await self._end_pace()

    async def _set_speeds(self, bytes_per_s: int) -> None:
        for mirror in self._mirrors():
            with contextlib.suppress(QmpError):  # it has failed; whoever looks at it tells why
                await mirror.set_speed(bytes_per_s)

    def _exports(self) -> Sequence[ExportUri]:
        return [parse_uri(move.uri) for move in self._moved() if move.uri]

    async def ordered(self) -> None:
        """Makes the guest's writes wait for the destination, and lets what is left be sent. Raises as `begin` does."""
        mirrors = self._mirrors()
        if not mirrors:
            return
        if self._handoff.record.bandwidth_bytes_per_s:
            await self._end_pace()
        for mirror in mirrors:
            _healthy(mirror.target, await mirror.look())
            await mirror.set_speed(0)
            if mirror.target not in self._blocking and await mirror.block_writes():
                self._blocking.add(mirror.target)
        deadline = time.monotonic() + SYNC_PATIENCE_S
        for mirror in mirrors:
            while time.monotonic() < deadline:
                job = _healthy(mirror.target, await mirror.look())
                if job.synced or (job.synced is None and job.ready):
                    break
                await asyncio.sleep(SYNC_POLL_S)
        await self._report()

    async def paused(self) -> None:
        """Ends the mirrors: both sides have the same bytes on return. Raises PreconditionError when one has failed."""
        await asyncio.gather(*(mirror.complete() for mirror in self._mirrors()))
        self._keep_bases()

    async def back(self) -> None:
        """Ends the mirrors, whatever the state of the link. Raises DeadlineError when QEMU does not let go."""
        await self._stop_keeping()
        await self._base.stop()
        turning_back = asyncio.create_task(self._turn_back())
        try:
            await asyncio.wait({turning_back}, timeout=ANSWER_TIMEOUT_S)
            if not turning_back.done():
                for move in self._moved():
                    if move.uri:
                        await kill_connections(parse_uri(move.uri))
            await turning_back
        finally:
            turning_back.cancel()
        self._handoff.disk_progress = ()

    async def _turn_back(self) -> None:
        uuid = self._handoff.record.domain_uuid
        if await is_active(self._slot, uuid):
            await asyncio.gather(*(self._mirror(move).cancel() for move in self._moved() if move.uri))
        for move in self._pulled():
            if move.overlay:
                await overlay.fold_back(self._slot, uuid, move)
                await self._blocking_call(partial(images.remove, move.overlay))

    async def released(self) -> None:
        """Removes the images, unless they were to be kept; never one that another guest of this host has too.

        What they were backed by may be others' too, and stays; so do block devices.
        """
        await self._stop_keeping()
        await self._base.stop()
        if self._handoff.record.keep_disks or not self._moved():
            return
        others = await self._of_others()
        for move in self._moved():
            for path in filter(None, (move.overlay, move.source)):
                if path in others:
                    self._handoff.log.warning("image stays: another guest has it too", path=path)
                else:
                    await self._blocking_call(partial(images.remove, path))

    async def _of_others(self) -> frozenset[str]:
        """Images in the definitions of other guests here, and in what those run with."""
        uuid = self._handoff.record.domain_uuid

        def read(connection: libvirt.virConnect) -> list[str]:
            others = [domain for domain in connection.listAllDomains() if domain.UUIDString() != uuid]
            return [_xml_of(domain, flags) for domain in others for flags in (0, libvirt.VIR_DOMAIN_XML_INACTIVE)]

        definitions = [xml for slot in self._slots for xml in await slot.call(read) if xml]
        disks = (disk for xml in definitions for disk in parse_domain(xml).iterfind("devices/disk"))
        return frozenset(layer.source for disk in disks for layer in layers(disk))

    async def _blocking_call(self, work: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _can_change(self) -> bool:
        commands = await self._monitor.execute("query-commands")
        assert isinstance(commands, Sequence)
        return any(isinstance(each, Mapping) and each.get("name") == "block-job-change" for each in commands)

    async def _until_in_step(self) -> None:
        waits_s = FIRST_LOOKS_S
        moved_at, moved = time.monotonic(), -1
        while not await self._report():
            done = sum(one.done_bytes for one in self._handoff.disk_progress)
            if done != moved:
                moved_at, moved = time.monotonic(), done
            elif time.monotonic() - moved_at > STALL_S:
                await self._check_link()
                moved_at = time.monotonic()
            await self._wait(self._pacing.wait(min(waits_s, self._soonest_s())))
            waits_s = min(2 * waits_s, LOOK_INTERVAL_S)
        await self._wait(self._pacing.settle())

    async def _wait(self, pacing: Awaitable[None]) -> None:
        try:
            await pacing
        except OSError as error:
            await self._back_to_speeds(str(error))

    async def _check_link(self) -> None:
        """A slow copy may go on. For a dead link QEMU itself would wait a quarter of an hour, and nobody be told."""
        for move in self._moved():
            await check_connection(parse_uri(move.uri))

    def _soonest_s(self) -> float:
        """When the next mirror may be in step: until that is seen nothing else is sent."""
        behind = [one for one in self._handoff.disk_progress if one.phase == pb.DISK_PHASE_SENDING and one.bytes_per_s]
        left_s = [(one.total_bytes - one.done_bytes) / one.bytes_per_s for one in behind]
        return max(FIRST_LOOKS_S, min(left_s, default=LOOK_INTERVAL_S))

    async def _report(self) -> bool:
        """Reads all mirrors, slows the guest where it would never end, tells the progress; whether all are in step."""
        readings = [await self._look_at(mirror) for mirror in self._mirrors()]
        self._handoff.disk_progress = readings
        behind = [reading.target for reading in readings if reading.phase == pb.DISK_PHASE_SENDING]
        if self._pacing.on and self._blocking:
            await self._back_to_speeds("the guest's writes wait for the destination")
        await self._share_out(behind)
        return not behind

    async def _look_at(self, mirror: Mirror) -> pb.DiskProgress:
        target = mirror.target
        job = _healthy(target, await mirror.look())
        samples = self._samples[target]
        samples.append(Sample(time.monotonic() - self._began_s, job.done_bytes, job.total_bytes, ready=job.ready))
        del samples[1 : max(1, len(samples) - MAX_SAMPLES)]
        pace = decide(samples)
        if pace.write_blocking and target not in self._blocking and await mirror.block_writes():
            self._blocking.add(target)
            self._why_blocking[target] = pace.reason
        return pb.DiskProgress(
            target=target,
            phase=pb.DISK_PHASE_IN_STEP if job.ready else pb.DISK_PHASE_SENDING,
            done_bytes=job.done_bytes,
            total_bytes=job.total_bytes,
            bytes_per_s=int(rate_bytes_per_s(samples)),
            write_blocking=target in self._blocking,
            decision=self._why_blocking.get(target) or pace.reason,
        )

    async def _share_out(self, behind: Sequence[str]) -> None:
        """Those that are behind share the rate that was asked for."""
        limit = self._handoff.record.bandwidth_bytes_per_s
        if not limit or len(behind) == self._sharing:
            return
        self._sharing = max(1, len(behind))
        if self._pacing.on:
            return
        for mirror in self._mirrors():
            if mirror.target in behind:
                await mirror.set_speed(limit // len(behind))


def _xml_of(domain: libvirt.virDomain, flags: int) -> str:
    """Empty for one that has just gone."""
    try:
        return str(domain.XMLDesc(flags))
    except libvirt.libvirtError:
        return ""


def _healthy(target: str, job: JobInfo | None) -> JobInfo:
    if job is None:
        raise PreconditionError(f"the copy of disk {target} is gone: somebody has ended its mirror")
    if job.concluded:
        raise PreconditionError(f"disk {target} could not be copied: {job.error or 'QEMU gives no reason'}")
    return job
