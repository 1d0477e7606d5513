"""What the host that is to take a guest's disks must know of them."""

from lxml import etree

from handoff.agent.v1 import disk_pb2 as pb
from handoff.agent.v1 import types_pb2 as types
from handoff_agent.disks.nodes import Executes, Node, disk_nodes
from handoff_agent.guests import layers, parse_domain


async def disk_facts(guest: types.Domain, live_xml: str, monitor: Executes) -> tuple[pb.DiskFacts, ...]:
    """The facts of all disks, in the order of the XML, sizes as QEMU itself tells them. `live_xml`: XMLDesc(0).

    Raises as `execute` does.
    """
    root = parse_domain(live_xml)
    nodes = await disk_nodes(monitor, root)
    placed = {disk.target: disk for disk in guest.disks}
    return tuple(
        _facts(element, placed[target], nodes.get(target))
        for element in root.iterfind("devices/disk")
        if (target := _target(element)) in placed
    )


def _facts(element: etree._Element, disk: types.Disk, node: Node | None) -> pb.DiskFacts:
    facts = pb.DiskFacts(
        target=disk.target,
        device=disk.device,
        kind=layers(element)[0].kind,
        source=disk.source,
        format=disk.format,
        placement=disk.placement,
        read_only=disk.read_only,
        shareable=element.find("shareable") is not None,
    )
    if node is not None:
        facts.virtual_size_bytes = node.virtual_size_bytes
        facts.allocated_bytes = node.allocated_bytes
        facts.backing.extend(node.backing)
        facts.snapshots = node.snapshots
        facts.encrypted = node.encrypted
        facts.cluster_bytes = node.cluster_bytes
        facts.data_file = node.data_file
        facts.bitmaps.extend(node.bitmaps)
    return facts


def _target(element: etree._Element) -> str:
    target = element.find("target")
    return "" if target is None else target.get("dev", "")
