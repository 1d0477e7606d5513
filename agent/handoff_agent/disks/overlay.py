"""An external snapshot of disks that are pulled, so that their base no longer changes; and its undoing.

    make        the guest writes to an overlay beside its base
    fold_back   what it wrote goes into the base, and the guest goes on with that: nothing shows that there was one

libvirt does both, so its view of the guest stays right.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Final
from xml.sax.saxutils import quoteattr

import libvirt

from handoff.agent.v1 import disk_pb2 as pb
from handoff_agent.domains import is_active
from handoff_agent.guests import layers, parse_domain
from handoff_agent.monitor import Monitor
from handoff_agent.slots import LibvirtFailure, Slot
from handoff_common.errors import DeadlineError, PreconditionError

SNAPSHOT_TIMEOUT_S: Final = 20.0
FOLD_TIMEOUT_S: Final = 60.0
POLL_S: Final = 0.05
_SNAPSHOT_FLAGS: Final = (
    libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
)
_HANDED_OVER: Final = ("postmigrate", "finish-migrate")
"""QEMU's run states in which it has given its images away."""


async def sources(slot: Slot, uuid: str) -> dict[str, str]:
    """The path of each disk's top image, by target."""
    root = parse_domain(await slot.on_domain(uuid, lambda domain: domain.XMLDesc(0)))
    found: dict[str, str] = {}
    for disk in root.iterfind("devices/disk"):
        target = disk.find("target")
        if target is not None:
            found[target.get("dev", "")] = layers(disk)[0].source
    return found


async def make(slot: Slot, uuid: str, moves: Sequence[pb.DiskMove]) -> None:
    """Gives these disks overlays, all at one moment; those that have theirs keep it. Raises as Slot.call does."""
    tops = await sources(slot, uuid)
    wanted = {move.target: move.overlay for move in moves if tops.get(move.target) != move.overlay}
    if not wanted:
        return
    disks = "".join(
        f"<disk name={quoteattr(target)} snapshot='external'><driver type='qcow2'/>"
        f"<source file={quoteattr(wanted[target])}/></disk>"
        if target in wanted
        else f"<disk name={quoteattr(target)} snapshot='no'/>"
        for target in tops
    )
    xml = f"<domainsnapshot><disks>{disks}</disks></domainsnapshot>"
    await slot.on_domain(uuid, lambda domain: domain.snapshotCreateXML(xml, _SNAPSHOT_FLAGS), SNAPSHOT_TIMEOUT_S)


async def fold_back(slot: Slot, uuid: str, move: pb.DiskMove) -> None:
    """Brings a disk back to its base; does nothing when it is there. Nobody else may have the base open.

    Raises DeadlineError when it takes more than FOLD_TIMEOUT_S: what is left goes on the next time.
    """
    deadline = time.monotonic() + FOLD_TIMEOUT_S
    monitor = Monitor(slot, uuid)
    while await is_active(slot, uuid) and (await sources(slot, uuid)).get(move.target) == move.overlay:
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"disk {move.target}: {move.overlay} is not yet folded back into {move.source}; it is tried again"
            )
        if await monitor.query_status() not in _HANDED_OVER:
            await _advance(slot, uuid, move)
        await asyncio.sleep(POLL_S)


async def _advance(slot: Slot, uuid: str, move: pb.DiskMove) -> None:
    """Begins the commit, or ends it once both are the same."""

    def work(domain: libvirt.virDomain) -> None:
        job = domain.blockJobInfo(move.target)
        if not job:
            domain.blockCommit(move.target, move.source, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
        elif job["cur"] == job["end"] and job["end"]:
            domain.blockJobAbort(move.target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)

    # "not yet ready for pivot" passes.
    with contextlib.suppress(PreconditionError, LibvirtFailure):
        await slot.on_domain(uuid, work)
