"""`make bench-upgrade`: another QEMU under running guests that have touched 256 MiB, 2 GiB and 8 GiB of their memory.

Each guest goes back and forth between two builds of one release, first by `cpr`, then, as a guest whose memory can't be
passed on, by `copy`. Of each upgrade are kept:

    total_ms          what a client waits for: from the request until the answer that it is done
    pause_ms          how long the guest's own clock stood still (see clock.py)
    stop_resume_ms    from STOP of the old QEMU to RESUME of the new one, by their own time stamps
    network_gap_ms    longest silence of an echo every millisecond, seen from another host
    ram_bytes         memory sent, by QEMU's count
    copy_mib_per_s    only of a copy: memory sent by the time that it took until the guest was held

A copy is measured against what this machine copies from one piece of memory to another, in the same run: memory that
was used before. The new QEMU's was not. So beside it stands, as `new_memory_mib_per_s`, how fast the machine gives a
process as much memory that it had not, just before that guest's upgrades. No copy can be faster than that.
"""

import asyncio
import ctypes
import json
import mmap
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click
import grpc
import grpc.aio

from bench.client import Client
from bench.clock import clock_lag_ms
from bench.pauses import PauseWatch, watch_pauses
from handoff.agent.v1.qemu_pb2 import TransferMethod
from handoff.controller.v1.guests_pb2 import Guest
from handoff.controller.v1.migrations_pb2 import Migration
from handoff_common.channel import open_channel
from handoff_controller.machine import State
from handoff_lab.fleet import Fleet
from handoff_lab.guest import Guests
from handoff_lab.probe import GuestControl, UdpProbe
from handoff_lab.state import DEFAULT_PREFIX, GuestRecord, Lab, Release

REPORT = Path("out/bench/upgrade.json")
LAB = Path("/var/tmp/handoff-bench-up")
GUEST, HOME, OBSERVER = "bench", "h1", "h2"
SIZES_MIB = (256, 2048, 8192)
# What the guest needs beside the memory that it touches; its kernel keeps 64 bytes for each page.
OWN_MIB, PAGES_PER_PAGE_OF_TABLES = 192, 32
DIRTY_MIB_PER_S = 8
TOUCH_DEADLINE_S = 900.0
DEADLINE_S = 300.0
SETTLE_S = 1.0
MOST_TOTAL_MS, MOST_PAUSE_MS, MOST_GROWTH = 2000.0, 50.0, 1.3
LEAST_OF_MEMCPY = 0.5
METHODS = {"cpr": TransferMethod.TRANSFER_METHOD_CPR, "copy": TransferMethod.TRANSFER_METHOD_UNIX}


@dataclass(frozen=True, slots=True)
class Reading:
    """One upgrade. `copy_mib_per_s`: 0 where nothing is copied."""

    total_ms: float
    pause_ms: float
    stop_resume_ms: float
    network_gap_ms: float
    packets_lost: int
    ram_bytes: int
    copy_mib_per_s: float


class Subject:
    """One guest that goes back and forth between two slots and builds."""

    def __init__(
        self, fleet: Fleet, guest: GuestRecord, builds: tuple[Release, Release], channel: grpc.aio.Channel
    ) -> None:
        self._fleet = fleet
        self._guest = guest
        self._builds = builds
        self._client = Client(channel, DEADLINE_S)
        self._node = fleet.node(OBSERVER)

    async def upgrade(self, number: int, pauses: PauseWatch) -> tuple[Migration, Reading]:
        """The upgrade with that number, counted from 0."""
        source, destination = ("a", "b") if number % 2 == 0 else ("b", "a")
        await self._client.settled(self._guest.uuid, partial(_is_in, source), SETTLE_S)
        pauses.clear()
        async with UdpProbe(self._fleet.lab, self._node, self._guest.ip) as probe:
            before_ms = await clock_lag_ms(self._node, self._guest.ip)
            began = time.monotonic()
            release = self._builds[(number + 1) % 2].name
            done = await self._client.done(await self._client.create_upgrade(self._guest.uuid, release))
            total_ms = 1000 * (time.monotonic() - began)
            after_ms = await clock_lag_ms(self._node, self._guest.ip)
            udp = await probe.stop()
        outcome = done.outcome
        copying_ms = _lasted_ms(done, State.COPYING) + outcome.paused_to_held_ms
        copied = done.method == METHODS["copy"]
        return done, Reading(
            total_ms=round(total_ms, 1),
            pause_ms=round(after_ms - before_ms, 1),
            stop_resume_ms=round(await asyncio.to_thread(pauses.pause_ms, source, destination), 1),
            network_gap_ms=round(udp.longest_gap_ms, 1),
            packets_lost=udp.lost,
            ram_bytes=outcome.ram_bytes,
            copy_mib_per_s=round(outcome.ram_bytes / (1 << 20) / copying_ms * 1000, 1) if copied else 0.0,
        )


def _is_in(slot: str, guest: Guest) -> bool:
    return guest.owner.slot == slot and guest.domain.slot == slot


def guest_memory_mib(touched_mib: int) -> int:
    """Memory of a guest that touches so much of it."""
    return touched_mib + OWN_MIB + touched_mib // PAGES_PER_PAGE_OF_TABLES


def _lasted_ms(migration: Migration, state: State) -> float:
    for change, following in zip(migration.timeline, migration.timeline[1:], strict=False):
        if change.state == state.value:
            return (following.time.ToNanoseconds() - change.time.ToNanoseconds()) / 1e6
    return 0.0


def memory_copy_mib_per_s(size: int = 256 << 20, rounds: int = 5) -> float:
    """How fast this machine copies memory that was touched before, on one processor: the best of some rounds."""
    source, target = mmap.mmap(-1, size), mmap.mmap(-1, size)
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(area)) for area in (source, target)]
    for address in addresses:
        ctypes.memset(address, 1, size)
    took_s = []
    for _ in range(rounds):
        began = time.perf_counter()
        ctypes.memmove(addresses[1], addresses[0], size)
        took_s.append(time.perf_counter() - began)
    return float((size >> 20) / min(took_s))


def new_memory_mib_per_s(size: int) -> float:
    """How fast this machine gives a process new memory, as QEMU asks for it: in huge pages, cleared by the kernel."""
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    began = time.perf_counter()
    for offset in range(0, size, mmap.PAGESIZE):
        ctypes.memset(address + offset, 1, 1)
    return float((size >> 20) / (time.perf_counter() - began))


async def _measure(fleet: Fleet, method: str, size_mib: int, rounds: int) -> list[Reading]:
    lab = fleet.lab
    first = lab.release()
    builds = (first, lab.release(f"{first.name}-rebuilt"))
    guest = await asyncio.to_thread(
        Guests(fleet).create, GUEST, HOME, guest_memory_mib(size_mib), disks=(), shareable=method == "cpr"
    )
    try:
        control = GuestControl(fleet.node(OBSERVER), guest.ip, TOUCH_DEADLINE_S)
        await control.dirty(size_mib, DIRTY_MIB_PER_S)
        readings = []
        sockets = {slot: lab.libvirt_socket(HOME, slot) for slot in ("a", "b")}
        async with open_channel(f"unix:{lab.controller_socket('ctl1')}") as channel:
            subject = Subject(fleet, guest, builds, channel)
            with watch_pauses(GUEST, sockets) as pauses:
                for number in range(rounds + 1):
                    done, reading = await subject.upgrade(number, pauses)
                    if done.method != METHODS[method]:
                        raise click.ClickException(f"not {method}: {done.plan}")
                    warm_up = number == 0
                    click.echo(
                        f"{method:4} {size_mib:5} MiB: total {reading.total_ms:7.1f} ms, pause {reading.pause_ms:6.1f},"
                        f" STOP to RESUME {reading.stop_resume_ms:6.1f}, network gap {reading.network_gap_ms:6.1f},"
                        f" {reading.ram_bytes / (1 << 20):8.1f} MiB sent,"
                        f" {reading.copy_mib_per_s:.0f} MiB/s{'  (warm-up, not counted)' if warm_up else ''}"
                    )
                    if not warm_up:
                        readings.append(reading)
        status = await control.dirty_off()
        if status.bad_pages:
            raise click.ClickException(f"{status.bad_pages} pages of the guest's memory are wrong")
    finally:
        await asyncio.to_thread(Guests(fleet).delete, GUEST)
    return readings


def _median(readings: list[Reading], name: str) -> float:
    return float(statistics.median(getattr(reading, name) for reading in readings))


def summarise(
    found: dict[str, dict[int, list[Reading]]], memcpy_mib_per_s: float, new_mib_per_s: dict[int, float]
) -> dict[str, object]:
    """The report: raw figures, medians and whether they are what was asked for."""
    names = list(Reading.__dataclass_fields__)
    report: dict[str, object] = {
        method: {
            str(size): {
                "median": {name: round(_median(readings, name), 1) for name in names},
                "each": [asdict(reading) for reading in readings],
            }
            for size, readings in sizes.items()
        }
        for method, sizes in found.items()
    }
    cpr, copy = found.get("cpr", {}), found.get("copy", {})
    targets: dict[str, bool] = {}
    for size, readings in cpr.items():
        targets[f"cpr {size} MiB: total < {MOST_TOTAL_MS:g} ms"] = _median(readings, "total_ms") < MOST_TOTAL_MS
        targets[f"cpr {size} MiB: pause < {MOST_PAUSE_MS:g} ms"] = _median(readings, "pause_ms") < MOST_PAUSE_MS
    if len(cpr) > 1:
        growth = _median(cpr[max(cpr)], "pause_ms") / _median(cpr[min(cpr)], "pause_ms")
        report["cpr_pause_growth"] = round(growth, 2)
        targets[f"cpr: pause of {max(cpr)} MiB <= {MOST_GROWTH:g} × that of {min(cpr)} MiB"] = growth <= MOST_GROWTH
    for size, readings in copy.items():
        rate = _median(readings, "copy_mib_per_s")
        targets[f"copy {size} MiB: at least half of the memory-copy speed"] = rate >= LEAST_OF_MEMCPY * memcpy_mib_per_s
    report |= {
        "memory_copy_mib_per_s": round(memcpy_mib_per_s, 1),
        "new_memory_mib_per_s": {str(size): round(rate, 1) for size, rate in new_mib_per_s.items()},
        "dirty_mib_per_s": DIRTY_MIB_PER_S,
        "load_average": os.getloadavg(),
        "targets": targets,
    }
    return report


@click.command()
@click.option("--rounds", default=4, show_default=True, help="Upgrades of each guest; one more warms up.")
@click.option("--size", "sizes", type=int, multiple=True, default=SIZES_MIB, show_default=True, metavar="MIB")
@click.option("--method", "methods", type=click.Choice(list(METHODS)), multiple=True, default=list(METHODS))
def main(rounds: int, sizes: tuple[int, ...], methods: tuple[str, ...]) -> None:
    """Measures hot upgrades, in a lab of its own."""
    lab = Lab(
        Path(os.environ.get("HANDOFF_BENCH_DIR") or LAB), Path(os.environ.get("HANDOFF_PREFIX") or DEFAULT_PREFIX)
    )
    fleet = Fleet(lab)
    memcpy_mib_per_s = memory_copy_mib_per_s()
    click.echo(f"this machine copies {memcpy_mib_per_s:.0f} MiB/s of memory")
    found: dict[str, dict[int, list[Reading]]] = {}
    new_mib_per_s: dict[int, float] = {}
    try:
        # A copy needs the guest's memory twice.
        fleet.up(hosts=2, controllers=1, etcd=1, host_memory_mib=2 * guest_memory_mib(max(sizes)) + 1024)
        for method in methods:
            for size in sizes:
                if method == "copy":
                    new_mib_per_s[size] = new_memory_mib_per_s(size << 20)
                    click.echo(f"this machine gives {new_mib_per_s[size]:.0f} MiB/s of new memory")
                found.setdefault(method, {})[size] = asyncio.run(_measure(fleet, method, size, rounds))
    finally:
        fleet.down()
    report = summarise(found, memcpy_mib_per_s, new_mib_per_s)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    targets = report["targets"]
    assert isinstance(targets, dict)
    for target, met in targets.items():
        click.echo(f"{'met   ' if met else 'MISSED'} {target}")
    click.echo(f"details in {REPORT}")


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("bench: the lab needs root")
    main()
