"""A guest's XML with the disks that it has at the destination. Pure."""

from collections.abc import Sequence

from lxml import etree

from handoff.agent.v1 import disk_pb2 as pb
from handoff_agent.disks.plan import MOVED, PULL
from handoff_agent.disks.uris import parse_uri
from handoff_agent.guests import layers, parse_domain

# For this long a guest's reads wait for a source that can't be reached, instead of failing.
RECONNECT_DELAY_S = 7 * 24 * 3600


def with_disks(xml: str, moves: Sequence[pb.DiskMove], *, running: bool) -> str:
    """The XML with path and format of every disk that is moved. Idempotent.

    `running`: of the domain that is created; a disk that is pulled then names what it is backed by. A disk of the
    definition that is another one than the running guest has (a change for its next boot) stays as it is. No XML stays
    none. Raises InvalidArgumentError when `xml` isn't a domain.
    """
    if not xml:
        return ""
    root = parse_domain(xml)
    by_target = {move.target: move for move in moves if move.strategy in MOVED}
    for disk in root.iterfind("devices/disk"):
        target = disk.find("target")
        move = by_target.get("" if target is None else target.get("dev", ""))
        if move is not None and layers(disk)[0].source in (move.source, move.path, move.overlay):
            _rewrite(disk, move)
            if running and move.strategy == PULL:
                _add_base(disk, move)
    return etree.tostring(root.getroottree(), encoding="unicode")


def _rewrite(disk: etree._Element, move: pb.DiskMove) -> None:
    disk.set("type", "file")
    source, driver = disk.find("source"), disk.find("driver")
    assert source is not None
    if "dev" in source.attrib:
        del source.attrib["dev"]
    for slices in source.findall("slices"):  # the mirror has sent what was in them, and is all of that
        source.remove(slices)
    source.set("file", move.path)
    if driver is None:
        driver = etree.Element("driver", {"name": "qemu"})
        driver.tail = disk.text
        disk.insert(0, driver)
    driver.set("type", move.format)
    for backing in disk.findall("backingStore"):
        disk.remove(backing)


def _add_base(disk: etree._Element, move: pb.DiskMove) -> None:
    """libvirt's order of elements does not matter to it; `reconnect` makes reads wait for a source that is away."""
    export = parse_uri(move.base_uri)
    backing = etree.SubElement(disk, "backingStore", {"type": "network"})
    etree.SubElement(backing, "format", {"type": "raw"})
    source = etree.SubElement(backing, "source", {"protocol": "nbd", "name": export.name})
    etree.SubElement(source, "host", {"name": export.host, "port": str(export.port)})
    etree.SubElement(source, "reconnect", {"delay": str(RECONNECT_DELAY_S)})
    etree.SubElement(backing, "backingStore")
