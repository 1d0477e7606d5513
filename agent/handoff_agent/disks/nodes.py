"""The block nodes of a guest's QEMU, by the disks of its XML."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from lxml import etree

from handoff_agent.monitor import Json


class Executes(Protocol):
    """Takes QMP commands: the monitor of a guest, or of a storage daemon."""

    async def execute(self, command: str, arguments: Mapping[str, Json] | None = None) -> Json:
        """Runs a command and returns its result. Raises QmpError when it is refused."""


@dataclass(frozen=True, slots=True)
class Node:
    """What is plugged into one disk device. Sizes are bytes."""

    name: str
    virtual_size_bytes: int = 0
    allocated_bytes: int = 0
    """Of all layers."""
    snapshots: int = 0
    encrypted: bool = False
    cluster_bytes: int = 0
    backing: tuple[str, ...] = ()
    """Names of the images below, the nearest first."""
    data_file: str = ""
    """Has the data instead of the image."""
    bitmaps: tuple[str, ...] = ()
    """Names of the persistent dirty bitmaps of all layers."""


async def disk_nodes(monitor: Executes, root: etree._Element) -> dict[str, Node]:
    """The nodes by the target device of their disk, for a running domain's plain XML. Raises as `execute` does."""
    devices = cast(Sequence[Mapping[str, Json]], await monitor.execute("query-block"))
    found: dict[str, Node] = {}
    for disk in root.iterfind("devices/disk"):
        target, alias = disk.find("target"), disk.find("alias")
        if target is None or alias is None:
            continue
        for device in devices:
            if _is_of(str(device.get("qdev", "")), alias.get("name", "")) and device.get("inserted"):
                found[target.get("dev", "")] = parse_node(cast(Mapping[str, Json], device["inserted"]))
    return found


def parse_node(inserted: Mapping[str, Json]) -> Node:
    """Reads a BlockDeviceInfo of query-block."""
    image = cast(Mapping[str, Json], inserted["image"])
    layers = [image]
    while below := layers[-1].get("backing-image"):
        layers.append(cast(Mapping[str, Json], below))
    return Node(
        name=str(inserted["node-name"]),
        virtual_size_bytes=_int(image, "virtual-size"),
        allocated_bytes=sum(_int(layer, "actual-size") for layer in layers),
        snapshots=len(cast(Sequence[Json], image.get("snapshots") or ())),
        encrypted=any(bool(layer.get("encrypted")) for layer in layers),
        cluster_bytes=_int(image, "cluster-size") if image.get("format") == "qcow2" else 0,
        backing=tuple(str(layer.get("filename", "")) for layer in layers[1:]),
        data_file=str(_of_format(image).get("data-file", "")),
        bitmaps=tuple(sorted(set(_bitmaps(inserted, layers)))),
    )


def _bitmaps(inserted: Mapping[str, Json], layers: Sequence[Mapping[str, Json]]) -> Iterator[str]:
    # One that was made since QEMU has the image open is not in the image yet.
    for bitmap in cast(Sequence[Mapping[str, Json]], inserted.get("dirty-bitmaps") or ()):
        if bitmap.get("persistent"):
            yield str(bitmap.get("name", ""))
    for layer in layers:
        for bitmap in cast(Sequence[Mapping[str, Json]], _of_format(layer).get("bitmaps") or ()):
            yield str(bitmap.get("name", ""))


def _of_format(image: Mapping[str, Json]) -> Mapping[str, Json]:
    """What is told of qcow2 alone."""
    told = cast(Mapping[str, Json], image.get("format-specific") or {})
    return cast(Mapping[str, Json], told.get("data") or {}) if told.get("type") == "qcow2" else {}


def _is_of(qdev: str, alias: str) -> bool:
    """QEMU names a device by its id, or by its path where the disk is an inner part of it (virtio)."""
    return qdev == alias or f"/{alias}/" in qdev


def _int(values: Mapping[str, Json], key: str) -> int:
    value = values.get(key)
    return value if isinstance(value, int) else 0
