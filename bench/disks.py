"""`make bench-disks`: guests with a local disk, moved by us and by `virsh migrate --copy-storage-all`, into
out/bench/disks.json.

Every pair of formats, and three contents of a 1 GiB disk:

    holes   192 MiB of data, the rest never written
    zeros   192 MiB of data, 256 MiB of written zeros, the rest never written
    half    512 MiB of data, the rest never written

Each move is of a new guest, so that both find the same image. Of each are kept: the bytes that the source's host sent,
by its interface's counter; those of the memory, by QEMU's count; what the image at the destination has allocated; the
time until the command or the API says that it is done. Both are told the same rate, and three figures are by that:

    disk_link_use   the rate between the first and the last tenth of the disk's data, while nothing else is sent
    link_use        the same of all bytes: the destination's disk is flushed between the disk and the memory
    most_in_1s      the largest rate over a second, until the last tenth of all bytes

The disk's content is compared with what was made after each of our moves.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import click

from bench.mover import Mover
from bench.wire import Wire
from handoff.controller.v1.migrations_pb2 import MigrationOptions
from handoff_lab.fleet import Fleet
from handoff_lab.guest import Guests, virsh
from handoff_lab.pattern import MIB
from handoff_lab.proof import inspect
from handoff_lab.state import DEFAULT_PREFIX, GuestRecord, Lab

REPORT = Path("out/bench/disks.json")
LAB = Path("/var/tmp/handoff-bench-disks")
FORMATS = ("raw", "qcow2")
CONTENTS = {"holes": (192, 0), "zeros": (192, 256), "half": (512, 0)}
SIZE_MIB, MEMORY_MIB = 1024, 128
RATE_MIB_PER_S = 64
DEADLINE_S = 300.0
SETTLE_S = 1.0
MOST_WIRE, MOST_ALLOCATED, LEAST_LINK_USE, MOST_IN_1S = 1.02, 1.02, 0.95, 1.05
MEASURES = {
    "wire": "bytes sent beside the memory, by the disk's data",
    "allocated": "bytes allocated at the destination, by the disk's data",
    "disk_link_use": "rate from a tenth to nine tenths of the disk's data, by the set rate",
    "link_use": "rate from a tenth to nine tenths of all bytes, the flush before the memory included, by the set rate",
    "most_in_1s": "largest rate over 1 s, from the first byte to nine tenths of them, by the set rate",
}


Cells: TypeAlias = dict[str, dict[str, dict[str, float]]]
"""Figures by cell and by whose move it was."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One move. `wire`: what was sent beside the memory, by the disk's data; `allocated`: by the disk's data."""

    total_ms: float
    sent_bytes: int
    ram_bytes: int
    allocated_bytes: int
    wire: float
    allocated: float
    link_use: float
    most_in_1s: float
    disk_link_use: float


@dataclass(frozen=True, slots=True)
class Cell:
    """A kind of move."""

    source: str
    destination: str
    content: str

    @property
    def name(self) -> str:
        """Such as raw-qcow2-holes."""
        return f"{self.source}-{self.destination}-{self.content}"

    @property
    def data_bytes(self) -> int:
        """What has to be sent."""
        return CONTENTS[self.content][0] * MIB


class Bench:
    """A fleet, and new guests on it."""

    def __init__(self, fleet: Fleet, mover: Mover, release: str) -> None:
        self._fleet = fleet
        self._guests = Guests(fleet)
        self._mover = mover
        self._release = release

    async def measure(self, cell: Cell) -> dict[str, dict[str, float]]:
        """Both moves of one kind."""
        await asyncio.to_thread(self._fleet.set_type, "h2", cell.destination)
        ours = await self._of_new_guest(cell, "ours", self._ours)
        virsh = await self._of_new_guest(cell, "virsh", self._virsh)
        return {"ours": asdict(ours), "virsh": asdict(virsh)}

    async def _of_new_guest(
        self, cell: Cell, who: str, move: Callable[[GuestRecord, Cell], Coroutine[None, None, tuple[float, int]]]
    ) -> Reading:
        data_mib, zeros_mib = CONTENTS[cell.content]
        disk = f"size={SIZE_MIB}M,format={cell.source},place=local,data={data_mib}M,zeros={zeros_mib}M"
        create = self._guests.create
        guest = await asyncio.to_thread(create, who, "h1", MEMORY_MIB, 1, (disk,), release=self._release)
        try:
            await self._mover.known(guest.name, "h1")
            await asyncio.to_thread(os.sync)
            await asyncio.sleep(SETTLE_S)
            with Wire(self._fleet.node("h1")) as wire:
                total_ms, ram_bytes = await move(guest, cell)
            (found,) = await asyncio.to_thread(inspect, self._guests, guest.name)
        finally:
            await asyncio.to_thread(self._guests.delete, guest.name)
        if not found.intact or found.disk.host != "h2" or found.disk.format != cell.destination:
            raise click.ClickException(f"{cell.name}, {who}: the disk is not what it was: {found}")
        reading = Reading(
            total_ms=round(total_ms, 1),
            sent_bytes=wire.sent_bytes,
            ram_bytes=ram_bytes,
            allocated_bytes=found.disk.allocated_bytes,
            wire=round((wire.sent_bytes - ram_bytes) / cell.data_bytes, 4),
            allocated=round(found.disk.allocated_bytes / cell.data_bytes, 4),
            link_use=round(wire.middle_bytes_per_s() / (RATE_MIB_PER_S * MIB), 3),
            disk_link_use=round(wire.middle_bytes_per_s(cell.data_bytes) / (RATE_MIB_PER_S * MIB), 3),
            most_in_1s=round(wire.most_bytes_per_s() / (RATE_MIB_PER_S * MIB), 3),
        )
        click.echo(
            f"{cell.name:18} {who:5} {reading.total_ms:8.0f} ms, wire {reading.wire:.3f}, "
            f"allocated {reading.allocated:.3f}, "
            f"link {reading.link_use:.2f}, of the disk {reading.disk_link_use:.2f}, in 1 s {reading.most_in_1s:.2f}"
        )
        return reading

    async def _ours(self, guest: GuestRecord, cell: Cell) -> tuple[float, int]:
        options = MigrationOptions(bandwidth_bytes_per_s=RATE_MIB_PER_S * MIB)
        migration, total_ms = await self._mover.move(guest.name, "h2", options)
        return total_ms, migration.outcome.ram_bytes

    async def _virsh(self, guest: GuestRecord, cell: Cell) -> tuple[float, int]:
        return await asyncio.to_thread(self._virsh_at_once, guest, cell)

    def _virsh_at_once(self, guest: GuestRecord, cell: Cell) -> tuple[float, int]:
        """As an operator does it: an image of the right size there, and a definition that names it."""
        source, destination = self._fleet.host("h1"), self._fleet.host("h2")
        (disk,) = guest.disks
        path = str(Path(disk.path).with_suffix(f".{cell.destination}"))
        destination.node.run(["qemu-img", "create", "-q", "-f", cell.destination, path, disk.size])
        xml = virsh(source, "a", "dumpxml", "--migratable", guest.name)
        xml = xml.replace(f"type='{cell.source}' cache", f"type='{cell.destination}' cache").replace(disk.path, path)
        (source.directory / "run/there.xml").write_text(xml)
        command = [
            *("virsh", "migrate", "--live", "--p2p", "--persistent", "--undefinesource", "--unsafe"),
            *("--copy-storage-all", "--bandwidth", str(RATE_MIB_PER_S)),
            *("--xml", "/run/there.xml", "--persistent-xml", "/run/there.xml"),
            *(guest.name, f"qemu+tcp://10.10.0.{destination.index}/system"),
        ]
        began = time.monotonic()
        source.node.run(command, deadline_s=DEADLINE_S)
        total_ms = 1000 * (time.monotonic() - began)
        statistics = virsh(destination, "a", "domjobinfo", guest.name, "--completed", "--rawstats")
        (ram_bytes,) = (int(line.split()[-1]) for line in statistics.splitlines() if "memory_processed" in line)
        return total_ms, ram_bytes


@dataclass(frozen=True, slots=True)
class Target:
    """The worst of our readings against what was aimed at."""

    worst: float
    target: float
    met: bool


def targets(cells: Cells) -> dict[str, Target]:
    """Of our moves."""

    def figures(name: str) -> list[float]:
        # A report that is added to may be older than the figure.
        return [cell["ours"][name] for cell in cells.values() if name in cell["ours"]]

    found = {}
    for name, most in (("wire", MOST_WIRE), ("allocated", MOST_ALLOCATED), ("most_in_1s", MOST_IN_1S)):
        worst = max(figures(name))
        found[name] = Target(worst, most, worst <= most)
    for name in ("link_use", "disk_link_use"):
        least = min(figures(name))
        found[name] = Target(least, LEAST_LINK_USE, least >= LEAST_LINK_USE)
    return found


def against_virsh(cell: dict[str, dict[str, float]]) -> dict[str, float]:
    """Ours divided by virsh's."""
    return {
        figure: round(cell["ours"][figure] / cell["virsh"][figure], 3)
        for figure in ("total_ms", "sent_bytes", "allocated_bytes")
    }


def write(release: str, cells: Cells, report: dict[str, object]) -> dict[str, Target]:
    """Puts what is measured by now into the report."""
    met = targets(cells)
    report[release] = {
        "targets": {name: asdict(target) for name, target in met.items()},
        "ours_by_virsh": {name: against_virsh(cell) for name, cell in cells.items()},
        "cells": cells,
    }
    report["rate_mib_per_s"], report["load_average"], report["measures"] = RATE_MIB_PER_S, os.getloadavg(), MEASURES
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    return met


async def run(
    fleet: Fleet, cells: list[Cell], release: str, done: Callable[[str, dict[str, dict[str, float]]], None]
) -> None:
    """Measures all of them; `done` is told of each."""
    async with Mover(fleet.lab, DEADLINE_S) as mover:
        bench = Bench(fleet, mover, release)
        for cell in cells:
            done(cell.name, await bench.measure(cell))


@click.command()
@click.option("--formats", multiple=True, metavar="FROM-TO", help="Only these, such as raw-qcow2; added to the report.")
@click.option("--content", "contents", multiple=True, type=click.Choice(list(CONTENTS)), help="Only this; added, too.")
@click.option("--release", default="", metavar="NAME", help="QEMU build.  [default: the preferred one]")
def main(formats: tuple[str, ...], contents: tuple[str, ...], release: str) -> None:
    """Compares our moves of local disks with libvirt's own, in a lab of its own."""
    lab = Lab(
        Path(os.environ.get("HANDOFF_BENCH_DIR") or LAB), Path(os.environ.get("HANDOFF_PREFIX") or DEFAULT_PREFIX)
    )
    cells = [
        Cell(source, destination, content)
        for source in FORMATS
        for destination in FORMATS
        for content in contents or CONTENTS
        if not formats or f"{source}-{destination}" in formats
    ]
    fleet = Fleet(lab)
    name = lab.release(release).name
    report = json.loads(REPORT.read_text()) if (formats or contents) and REPORT.exists() else {}
    measured: Cells = dict(report.get(name, {}).get("cells", {}))
    met: dict[str, Target] = {}

    def done(cell: str, readings: dict[str, dict[str, float]]) -> None:
        measured[cell] = readings
        met.update(write(name, measured, report))

    try:
        fleet.up(hosts=2, controllers=1, etcd=1)
        asyncio.run(run(fleet, cells, release, done))
    finally:
        fleet.down()
    for figure, target in met.items():
        click.echo(f"{figure}: worst {target.worst}, target {target.target}: {'met' if target.met else 'MISSED'}")
    click.echo(f"QEMU {name}; details in {REPORT}")


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("bench: the lab needs root")
    main()
