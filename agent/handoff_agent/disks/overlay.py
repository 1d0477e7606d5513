"""An external snapshot of disks that are pulled, so that their base no longer changes; and its undoing.

    make        the guest writes to an overlay beside its base
    fold_back   what it wrote goes into the base, and the guest goes on with that: nothing shows that there was one

libvirt does both, so its view of the guest stays right. What a guest wrote that has ended meanwhile is folded back
without it, by qemu-img, whose image locks keep QEMU out until that is done.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from xml.sax.saxutils import quoteattr

import libvirt
from lxml import etree

from handoff.agent.v1 import disk_pb2 as pb
from handoff_agent.disks.qemu_img import qemu_img
from handoff_agent.domains import is_active
from handoff_agent.guests import layers, parse_domain
from handoff_agent.monitor import Monitor
from handoff_agent.slots import LibvirtFailure, Slot
from handoff_common.errors import DeadlineError, NotFoundError, PreconditionError

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


async def chains(slot: Slot, uuid: str) -> dict[str, tuple[str, ...]]:
    """The paths of each disk's images, the top first, by target. Raises as Slot.call does."""
    root = parse_domain(await slot.on_domain(uuid, lambda domain: domain.XMLDesc(0)))
    return {
        target.get("dev", ""): tuple(layer.source for layer in layers(disk))
        for disk in root.iterfind("devices/disk")
        if (target := disk.find("target")) is not None
    }


async def make(slot: Slot, uuid: str, moves: Sequence[pb.DiskMove]) -> None:
    """Gives these disks overlays, all at one moment; those that have theirs keep it. Raises as Slot.call does."""
    found = await chains(slot, uuid)
    wanted = {move.target: move.overlay for move in moves if found.get(move.target, ("",))[0] != move.overlay}
    if not wanted:
        return
    disks = "".join(
        f"<disk name={quoteattr(target)} snapshot='external'><driver type='qcow2'/>"
        f"<source file={quoteattr(wanted[target])}/></disk>"
        if target in wanted
        else f"<disk name={quoteattr(target)} snapshot='no'/>"
        for target in found
    )
    xml = f"<domainsnapshot><disks>{disks}</disks></domainsnapshot>"
    await slot.on_domain(uuid, lambda domain: domain.snapshotCreateXML(xml, _SNAPSHOT_FLAGS), SNAPSHOT_TIMEOUT_S)


async def fold_back(slot: Slot, uuid: str, move: pb.DiskMove) -> None:
    """Brings a disk back to its base; on return nothing needs its overlay. Nobody else may have the base open.

    Raises DeadlineError when it takes more than FOLD_TIMEOUT_S: what is left goes on the next time. Raises
    PreconditionError when somebody has put another image on top of the overlay, and UnavailableError when the disk of a
    guest that has ended can't be written to.
    """
    deadline = time.monotonic() + FOLD_TIMEOUT_S
    monitor = Monitor(slot, uuid)
    while await is_active(slot, uuid):
        chain = (await chains(slot, uuid)).get(move.target, ())
        if move.overlay not in chain:
            return
        if chain[0] != move.overlay:
            raise PreconditionError(
                f"disk {move.target}: somebody has put {chain[0]} on top of {move.overlay}; commit that (virsh"
                f" blockcommit {move.target} --active --pivot --top {chain[0]} --base {move.overlay})"
            )
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"disk {move.target}: {move.overlay} is not yet folded back into {move.source}; it is tried again"
            )
        if await monitor.query_status() not in _HANDED_OVER:
            await _advance(slot, uuid, move)
        await asyncio.sleep(POLL_S)
    await _fold_without_guest(slot, uuid, move)


def without_overlay(xml: str, move: pb.DiskMove, *, is_block: bool) -> str:
    """A definition whose disk is its base again; as it is where it does not name the overlay. Pure."""
    root = parse_domain(xml)
    for disk in root.iterfind("devices/disk"):
        source, driver = disk.find("source"), disk.find("driver")
        if source is None or driver is None or source.get("file") != move.overlay:
            continue
        del source.attrib["file"]
        disk.set("type", "block" if is_block else "file")
        source.set("dev" if is_block else "file", move.source)
        driver.set("type", move.source_format)
        for backing in disk.findall("backingStore"):
            disk.remove(backing)
    return etree.tostring(root.getroottree(), encoding="unicode")


async def _fold_without_guest(slot: Slot, uuid: str, move: pb.DiskMove) -> None:
    """May be repeated at any point: the overlay stays valid on top of what has been committed."""
    if not Path(move.overlay).exists():  # noqa: ASYNC240 - on a local disk
        return
    await qemu_img("commit", "-q", "-f", "qcow2", move.overlay)
    is_block = Path(move.source).is_block_device()  # noqa: ASYNC240
    flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE

    def redefine(domain: libvirt.virDomain) -> None:
        if domain.isPersistent():
            domain.connect().defineXML(without_overlay(domain.XMLDesc(flags), move, is_block=is_block))

    with contextlib.suppress(NotFoundError):  # a guest without a definition
        await slot.on_domain(uuid, redefine)


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
