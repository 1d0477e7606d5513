"""`make bench-fast`: how long until a guest with 1, 4 and 8 GiB of data on a local disk runs at its destination, into
out/bench/fast.json.

Each guest is moved twice over a link of one rate: by copy, and with --fast, which pulls the data after the switch.
`running_ms` is from the request until RESUME of the destination's QEMU, by its own time stamp; `total_ms` until the
migration is done, which is when the source is not needed any more. The disk is compared with what was made at the end.
"""

import asyncio
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import click

from bench.mover import Mover
from bench.pauses import PauseWatch, watch_pauses
from handoff.controller.v1.migrations_pb2 import MigrationOptions
from handoff_lab.fleet import Fleet
from handoff_lab.guest import Guests
from handoff_lab.proof import inspect
from handoff_lab.state import DEFAULT_PREFIX, Lab

REPORT = Path("out/bench/fast.json")
LAB = Path("/var/tmp/handoff-bench-fast")
SIZES_GIB = (1, 4, 8)
MEMORY_MIB = 128
RATE = "1gbit"
DEADLINE_S = 900.0
SETTLE_S = 2.0
MOST_GROWTH = 1.1
WAYS = {"fast": True, "copy": False}
Cells: TypeAlias = dict[str, dict[str, dict[str, float]]]
"""Figures by GiB and way."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One move."""

    running_ms: float
    total_ms: float
    pause_ms: float


async def measure(fleet: Fleet, mover: Mover, gib: int, *, fast: bool) -> Reading:
    """One move of a new guest with that much data."""
    guests, name = Guests(fleet), f"data{gib}"
    disk = f"size={gib + 1}G,format=qcow2,place=local,data={gib}G"
    await asyncio.to_thread(guests.create, name, "h1", MEMORY_MIB, 1, (disk,))
    try:
        await mover.known(name, "h1")
        await asyncio.to_thread(os.sync)
        await asyncio.sleep(SETTLE_S)
        with watch_pauses(name, {host: fleet.lab.libvirt_socket(host, "a") for host in ("h1", "h2")}) as pauses:
            reading = await _move(mover, name, pauses, fast=fast)
        (found,) = await asyncio.to_thread(inspect, guests, name)
    finally:
        await asyncio.to_thread(guests.delete, name)
    if not found.intact or found.disk.host != "h2" or found.disk.layers != 1:
        raise click.ClickException(f"{name}: the disk is not what it was: {found}")
    return reading


async def _move(mover: Mover, name: str, pauses: PauseWatch, *, fast: bool) -> Reading:
    asked = time.time()
    _, total_ms = await mover.move(name, "h2", MigrationOptions(fast=fast))
    return Reading(
        running_ms=round(1000 * (pauses.resumed_s("h2") - asked), 1),
        total_ms=round(total_ms, 1),
        pause_ms=round(pauses.pause_ms("h1", "h2"), 1),
    )


def growth(cells: Cells, way: str) -> float | None:
    """How much longer the guest with most data takes than the one with least; None without both."""
    first, last = (cells.get(f"{gib}", {}).get(way) for gib in (SIZES_GIB[0], SIZES_GIB[-1]))
    return round(last["running_ms"] / first["running_ms"], 3) if first and last else None


async def run(fleet: Fleet, sizes: tuple[int, ...], ways: tuple[str, ...], cells: Cells) -> None:
    """Measures them, and writes the report after each."""
    async with Mover(fleet.lab, DEADLINE_S) as mover:
        for gib in sizes:
            for way in ways:
                reading = await measure(fleet, mover, gib, fast=WAYS[way])
                click.echo(
                    f"{gib} GiB {way}: runs there after {reading.running_ms:8.0f} ms, done after "
                    f"{reading.total_ms:8.0f} ms, pause {reading.pause_ms:.0f} ms"
                )
                cells.setdefault(f"{gib}", {})[way] = asdict(reading)
                write(cells)


def write(cells: Cells) -> None:
    """Puts what is measured by now into the report."""
    grew = growth(cells, "fast")
    report = {
        "target": {"growth_of_fast": grew, "target": MOST_GROWTH, "met": grew is not None and grew <= MOST_GROWTH},
        "growth": {way: growth(cells, way) for way in WAYS},
        "fast_by_copy": {
            gib: round(ways["fast"]["running_ms"] / ways["copy"]["running_ms"], 3)
            for gib, ways in cells.items()
            if len(ways) == len(WAYS)
        },
        "by_gib": cells,
        "link": RATE,
        "load_average": os.getloadavg(),
    }
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")


@click.command()
@click.option("--size", "sizes", multiple=True, type=int, metavar="GIB", help="Only these; added to the report.")
@click.option("--way", "ways", multiple=True, type=click.Choice(list(WAYS)), help="Only this; added to the report.")
def main(sizes: tuple[int, ...], ways: tuple[str, ...]) -> None:
    """Compares --fast with a copy, in a lab of its own."""
    lab = Lab(
        Path(os.environ.get("HANDOFF_BENCH_DIR") or LAB), Path(os.environ.get("HANDOFF_PREFIX") or DEFAULT_PREFIX)
    )
    fleet = Fleet(lab)
    report = json.loads(REPORT.read_text()) if (sizes or ways) and REPORT.exists() else {}
    cells: Cells = report.get("by_gib", {})
    try:
        fleet.up(hosts=2, controllers=1, etcd=1)
        for host in ("h1", "h2"):
            fleet.set_rate(host, RATE)
        asyncio.run(run(fleet, sizes or SIZES_GIB, ways or tuple(WAYS), cells))
    finally:
        fleet.down()
    grew = growth(cells, "fast")
    met = "not known" if grew is None else "met" if grew <= MOST_GROWTH else "MISSED"
    click.echo(
        f"fast grows by {grew} from {SIZES_GIB[0]} to {SIZES_GIB[-1]} GiB, target {MOST_GROWTH}: {met}; {REPORT}"
    )


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("bench: the lab needs root")
    main()
