"""A guest's local disks: whether they hold what they were made with, and what a move of theirs may leave behind."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Final

from lxml import etree

from handoff_lab.errors import LabError
from handoff_lab.guest import Sighting, virsh
from handoff_lab.host import LOCAL_FOLDERS, Host
from handoff_lab.pattern import MIB
from handoff_lab.proof import compare
from handoff_lab.reader import DiskReader
from soak.scene import Scene, storage_daemons

WRONG_SHOWN: Final = 3


def spoiled(scene: Scene) -> list[str]:
    """Local disks that are not what they were made, where the guest runs; or where it would be started again.

    They may be read while the guest runs, if its journal is stopped: it writes nothing else. To be called when nothing
    is left of a move: while a mirror writes, an image can't be read.
    """
    seen = scene.guests.find(scene.guest.name)
    hosts = {one for one in seen if one.state == "running"} or set(seen)
    if len(hosts) != 1:
        return [f"nobody knows whose disks the guest has: it is {_places(seen)}"]
    [sighting] = hosts
    host = scene.fleet.host(sighting.host)
    try:
        paths = _paths(virsh(host, sighting.slot, "dumpxml", scene.guest.name))
        return [problem for disk in scene.local_disks for problem in _spoiled(scene, host, disk.target, paths)]
    except (LabError, OSError) as error:
        return [f"the guest's disks can't be read: {error}"]


def _spoiled(scene: Scene, host: Host, target: str, paths: dict[str, tuple[str, str]]) -> list[str]:
    if target not in paths:
        return [f"the guest has no disk {target} on {host.name}"]
    path, image_format = paths[target]
    pattern = next(disk.pattern for disk in scene.local_disks if disk.target == target)
    reader = DiskReader(host.node, path, image_format)
    wrong, _ = compare(reader, pattern, skip_journal=target == scene.lane.journal)
    problems = []
    if wrong:
        where = ", ".join(map(str, wrong[:WRONG_SHOWN]))
        problems.append(f"{target} ({path} on {host.name}) is not what it was at {where}, and more: {len(wrong)} MiB")
    if reader.layers != 1 or reader.size_bytes != pattern.size_mib * MIB:
        problems.append(f"{target} ({path} on {host.name}) has {reader.layers} layers and {reader.size_bytes} bytes")
    return problems


def _paths(xml: str) -> dict[str, tuple[str, str]]:
    """Path and format of each disk of a domain, by its target."""
    found = {}
    for disk in etree.fromstring(xml.encode()).iterfind("devices/disk"):
        target, source, driver = disk.find("target"), disk.find("source"), disk.find("driver")
        if target is not None and source is not None and driver is not None:
            found[target.get("dev", "")] = (source.get("file", ""), driver.get("type", ""))
    return found


def left(scene: Scene, host: Host, keepers: Collection[str]) -> list[str]:
    """What is of the guest's disks on a host, and should not be. `keepers`: the hosts that have it, running or off."""
    expected = {disk.path for disk in scene.local_disks} if host.name in keepers else set()
    found = differences(images(host, scene.guest.name), expected)
    if daemons := storage_daemons(host):
        found.append(f"storage daemons {daemons}")
    folders = sorted(path.name for path in (host.directory / "run/handoff/storage").glob("*"))
    return found + [f"exports of handoff {folder}" for folder in folders]


def images(host: Host, guest: str) -> set[str]:
    """Whatever there is of a guest in the folders of local disks, overlays too, by its path inside of the host.

    Also the marks of images that came here, whose guest they don't tell.
    """
    folders = {f"/srv/{folder}": host.directory / folder for folder in LOCAL_FOLDERS}
    return {
        str(Path(inside) / path.relative_to(outside))
        for inside, outside in folders.items()
        for pattern in (f"{guest}-vd*", ".handoff-*")
        for path in outside.rglob(pattern)
        if path.is_file()
    }


def differences(present: Collection[str], expected: Collection[str]) -> list[str]:
    """Images that are too many, or missing. Pure."""
    surplus, missing = sorted(set(present) - set(expected)), sorted(set(expected) - set(present))
    return [f"image {path}" for path in surplus] + [f"image {path} is missing" for path in missing]


def jobs_left(scene: Scene, guest: Sighting) -> list[str]:
    """Mirrors that the guest's QEMU still has where it runs, and its ways to other hosts' exports."""
    host = scene.fleet.host(guest.host)

    def ask(command: str) -> list[dict[str, str]]:
        query = json.dumps({"execute": command})
        answer = json.loads(virsh(host, guest.slot, "qemu-monitor-command", guest.guest, query))
        return list(answer["return"])

    try:
        jobs, nodes = ask("query-jobs"), ask("query-named-block-nodes")
    except LabError as error:
        return [f"its QEMU can't be asked: {error}"]
    found = [f"job {job['id']} is {job['status']}" for job in jobs]
    return found + [f"QEMU's way to an export, {node['node-name']}" for node in nodes if node["drv"] == "nbd"]


def _places(seen: Collection[Sighting]) -> str:
    return ", ".join(f"{one.state} on {one.host}" for one in seen) or "nowhere"
