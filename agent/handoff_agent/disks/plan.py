"""What is done with each disk of a guest that comes to this host, and why. Pure.

    network volume, shared file                     skip
    local file or block device, same path, format   copy
    the same, another path or format here           convert
    local, and the guest shall arrive soon          pull
    what can't be moved                             refuse, with what to do

The host's type says where local disks live here and in what format.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final, TypeAlias

from handoff.agent.v1 import disk_pb2 as pb
from handoff.agent.v1 import types_pb2 as types
from handoff_agent.disks.space import PathFacts, Promise, promised_bytes, space_needed_bytes
from handoff_common.errors import ExhaustedError, HandoffError, PreconditionError

Strategy: TypeAlias = pb.DiskStrategy.ValueType

SKIP: Final = pb.DISK_STRATEGY_SKIP
COPY: Final = pb.DISK_STRATEGY_COPY
CONVERT: Final = pb.DISK_STRATEGY_CONVERT
PULL: Final = pb.DISK_STRATEGY_PULL
REFUSE: Final = pb.DISK_STRATEGY_REFUSE
MOVED: Final = frozenset({COPY, CONVERT, PULL})
"""Strategies by which the destination gets an image of its own."""

FORMATS: Final = ("raw", "qcow2")
# Each layer costs a look-up on every read of the mirror; a chain this deep is a backup tool that went astray.
DEEPEST_CHAIN: Final = 8
_PROTOCOLS: Final = {"nbd": "NBD", "rbd": "RBD", "iscsi": "iSCSI"}
_SKIPPED: Final = (types.DISK_PLACEMENT_SHARED, types.DISK_PLACEMENT_NETWORK, types.DISK_PLACEMENT_EMPTY)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a type of host keeps the disks that are local to it."""

    folder: str = ""
    """Empty: each disk keeps its path."""
    format: str = ""
    """"raw" or "qcow2"; empty: each disk keeps its format."""


@dataclass(frozen=True, slots=True)
class Site:
    """This host, as a place for disks."""

    host: str
    host_type: str
    place: Place
    paths: Mapping[str, PathFacts]
    """By path; for all that `paths_here` names, and all promises."""
    promises: Sequence[Promise] = ()
    tls: bool = False
    """Disks come by TLS only."""


def paths_here(disks: Sequence[pb.DiskFacts], place: Place, *, fast: bool) -> tuple[str, ...]:
    """The paths that the disks which are to be moved get here."""
    return tuple(_here(disk, place, fast=fast)[0] for disk in disks if disk.placement not in _SKIPPED)


def plan(disks: Sequence[pb.DiskFacts], site: Site, *, fast: bool = False) -> tuple[pb.DiskMove, ...]:
    """The plan for every disk, in their order. `fast`: pull local disks after the switch."""
    moves = [_plan_one(disk, site, fast=fast) for disk in disks]
    _refuse_twins(moves, site)
    _refuse_for_space(moves, site)
    return tuple(moves)


def refusal(guest: str, moves: Sequence[pb.DiskMove], *, only_space: bool) -> HandoffError | None:
    """The error for what is refused: ExhaustedError when `only_space` lacks, else PreconditionError; None for none."""
    reasons = [f"guest {guest}: disk {move.target} {move.reason}" for move in moves if move.strategy == REFUSE]
    if not reasons:
        return None
    return ExhaustedError("; ".join(reasons)) if only_space else PreconditionError("; ".join(reasons))


def lacks_only_space(disks: Sequence[pb.DiskFacts], site: Site, *, fast: bool = False) -> bool:
    """Whether free space is all that stands in the way."""
    return all(_plan_one(disk, site, fast=fast).strategy != REFUSE for disk in disks)


def _plan_one(disk: pb.DiskFacts, site: Site, *, fast: bool) -> pb.DiskMove:
    move = pb.DiskMove(
        target=disk.target,
        source=disk.source,
        source_format=disk.format,
        virtual_size_bytes=disk.virtual_size_bytes,
        base_uri=disk.base_uri,
        overlay=disk.overlay,
    )
    if disk.placement in _SKIPPED:
        move.strategy, move.reason = SKIP, _why_skipped(disk, site)
        move.path, move.format = disk.source, disk.format
        return move
    move.path, move.format = _here(disk, site.place, fast=fast)
    move.cluster_bytes = disk.cluster_bytes if move.format == disk.format else 0
    move.bytes_to_send = min(disk.allocated_bytes, disk.virtual_size_bytes)
    if site.tls and _is_pulled(disk, fast=fast):
        move.strategy, move.reason = REFUSE, f"can't be pulled by TLS, which host {site.host} asks for; go without fast"
    elif reason := next(_obstacles(disk, site, move), ""):
        move.strategy, move.reason = REFUSE, reason
    else:
        move.strategy, move.reason = _moved(disk, site, move, fast=fast)
    return move


def _here(disk: pb.DiskFacts, place: Place, *, fast: bool) -> tuple[str, str]:
    """Path and format on this host."""
    image_format = place.format or disk.format
    if _is_pulled(disk, fast=fast):
        image_format = "qcow2"  # a raw image can't say what it still lacks
    path = PurePosixPath(disk.source)
    if path.suffix == f".{disk.format}" and disk.kind == "file":
        path = path.with_suffix(f".{image_format}")
    return str(PurePosixPath(place.folder) / path.name if place.folder else path), image_format


def _is_pulled(disk: pb.DiskFacts, *, fast: bool) -> bool:
    # An overlay beside a block device would be a file in /dev.
    return fast and not disk.read_only and disk.device == "disk" and disk.kind == "file"


def _why_skipped(disk: pb.DiskFacts, site: Site) -> str:
    match disk.placement:
        case types.DISK_PLACEMENT_NETWORK:
            protocol, _, name = disk.source.partition(":")
            return f"network volume {name} ({_PROTOCOLS.get(protocol, protocol)}): {site.host} opens the same one"
        case types.DISK_PLACEMENT_EMPTY:
            return "no medium"
        case _:
            return f"shared storage: {site.host} sees the same file"


def _moved(disk: pb.DiskFacts, site: Site, move: pb.DiskMove, *, fast: bool) -> tuple[Strategy, str]:
    rest = f"; it takes in what it is backed by ({', '.join(disk.backing)})" if disk.backing else ""
    if disk.bitmaps:
        rest += f"; its dirty bitmaps ({', '.join(disk.bitmaps)}) are lost: the next backup of it must be a full one"
    if _is_pulled(disk, fast=fast):
        why = f"fast: {site.host} pulls it after the switch"
        if site.place.format not in ("", "qcow2"):
            why = f"{why}, as qcow2, though {site.host_type} hosts have {site.place.format}"
        return PULL, f"{why}{rest}"
    differs = []
    if move.path != disk.source:
        differs.append(f"{move.path}")
    if move.format != disk.format:
        differs.append(f"{move.format} instead of {disk.format}")
    if differs:
        return CONVERT, f"hosts of the type {site.host_type} have it as {', '.join(differs)}{rest}"
    return COPY, f"local to its host; {site.host} gets it at the same path{rest}"


def _obstacles(disk: pb.DiskFacts, site: Site, move: pb.DiskMove) -> Iterator[str]:
    if disk.device in ("cdrom", "floppy"):
        yield (
            f"is a {disk.device} with a local medium ({disk.source}); eject it (virsh change-media {disk.target} "
            "--eject)"
        )
    if disk.kind == "volume":
        yield f"is named by its storage pool ({disk.source}); name its file or device (type='file', type='block')"
    elif disk.device == "lun" or disk.kind not in ("file", "block"):
        yield f"is a device of its host that is passed through ({disk.source}); detach it, or use a network volume"
    if disk.format not in FORMATS:
        yield f"has the format {disk.format or '?'}, which is not handled (raw and qcow2 are); convert it first"
    if disk.encrypted:
        yield "is encrypted by QEMU, which is not handled; decrypt it, or encrypt in the guest"
    if disk.shareable:
        yield "is shared with other guests, which would go on with the old copy; put it on shared storage"
    if disk.snapshots:
        yield f"has {disk.snapshots} snapshots inside, which a copy would lose; delete them (qemu-img snapshot -d)"
    if disk.data_file:
        yield (
            f"has its data in another file ({disk.data_file}), which is not handled; make it one image"
            " (qemu-img convert)"
        )
    if len(disk.backing) >= DEEPEST_CHAIN:
        yield (
            f"is backed by a chain of {len(disk.backing)} images, and {DEEPEST_CHAIN - 1} are handled; shorten it"
            " (virsh blockcommit or blockpull)"
        )
    if not disk.virtual_size_bytes:
        yield "does not tell its size; look at it with virsh domblkinfo"
    yield from _place_obstacles(disk, site, move)


def _place_obstacles(disk: pb.DiskFacts, site: Site, move: pb.DiskMove) -> Iterator[str]:
    facts = site.paths.get(move.path, PathFacts())
    if disk.kind == "block" and not site.place.folder:
        yield (
            f"is the block device {disk.source}, and the configuration of host {site.host} names no folder for the"
            f" disks of hosts of the type {site.host_type}; set host_types.{site.host_type}.folder there"
        )
    elif not facts.folder_exists:
        yield f"would be {move.path} on host {site.host}, which has no such folder; create it there"
    elif facts.exists:
        yield f"would be {move.path} on host {site.host}, where that file exists; remove it there, or rename it"


def _refuse_twins(moves: Sequence[pb.DiskMove], site: Site) -> None:
    """Two disks that differ in their folder alone would meet in one."""
    taken: set[str] = set()
    for move in moves:
        if move.strategy not in MOVED:
            continue
        if move.path in taken:
            move.strategy, move.reason = REFUSE, f"and another disk would both be {move.path} on host {site.host}"
        taken.add(move.path)


def _refuse_for_space(moves: Sequence[pb.DiskMove], site: Site) -> None:
    together: dict[int, list[pb.DiskMove]] = defaultdict(list)
    for move in moves:
        if move.strategy in MOVED:
            together[site.paths.get(move.path, PathFacts()).file_system].append(move)
    for file_system, sharing in together.items():
        needed, free = (
            sum(space_needed_bytes(move) for move in sharing),
            site.paths.get(sharing[0].path, PathFacts()).free_bytes,
        )
        promised = promised_bytes(site.promises, site.paths, file_system)
        if needed + sum(promised.values()) <= free:
            continue
        whose = "needs" if len(sharing) == 1 else f"and {len(sharing) - 1} more need"
        folder = PurePosixPath(sharing[0].path).parent
        lack = f"{whose} {needed >> 20} MiB in {folder} on host {site.host}, which has {free >> 20} MiB free"
        if promised:
            guests = ", ".join(sorted(promised))
            lack = f"{lack} and has promised {sum(promised.values()) >> 20} MiB to disks on their way there ({guests})"
        for move in sharing:
            move.strategy, move.reason = REFUSE, lack
