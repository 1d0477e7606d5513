"""`make bench-handoff`: our migration against `virsh migrate --live --p2p` of the same guest over the same link.

In turns (ours there, ours back, virsh there, virsh back), so that both meet the same machine. `total_ms` is what a
client waits for: from the request until the answer that it is done. For virsh that is the command; for ours the calls
of the API that the `handoff` command makes. `downtime_ms` is from STOP at the source to RESUME at the destination, by
both QEMUs' own time stamps. Medians are compared.

Beside those figures the report keeps where our milliseconds went, by the migration's own record.
"""

import asyncio
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import click

from bench.client import Client
from bench.pauses import PauseWatch, watch_pauses
from handoff.controller.v1.guests_pb2 import Guest
from handoff.controller.v1.migrations_pb2 import Migration
from handoff_common.channel import open_channel
from handoff_controller.machine import State
from handoff_lab.fleet import Fleet
from handoff_lab.guest import Guests
from handoff_lab.probe import GuestControl
from handoff_lab.state import DEFAULT_PREFIX, GuestRecord, Lab

REPORT = Path("out/bench/handoff.json")
LAB = Path("/var/tmp/handoff-bench")
GUEST, MEMORY_MIB = "bench", 256
DIRTY_MIB, DIRTY_MIB_PER_S = 16, 8
DEADLINE_S = 120.0
SETTLE_S = 1.0


@dataclass(slots=True)
class Series:
    """The raw figures of one way to migrate."""

    total_ms: list[float] = field(default_factory=list)
    downtime_ms: list[float] = field(default_factory=list)

    def as_report(self) -> dict[str, list[float]]:
        """Rounded to a tenth of a millisecond."""
        return {
            "total_ms": [round(value, 1) for value in self.total_ms],
            "downtime_ms": [round(value, 1) for value in self.downtime_ms],
        }


class Bench:
    """One guest that goes back and forth between two hosts."""

    def __init__(self, fleet: Fleet, guest: GuestRecord, pauses: PauseWatch) -> None:
        self._fleet = fleet
        self._guest = guest
        self._pauses = pauses
        self.ours, self.virsh = Series(), Series()
        self.parts: list[dict[str, float]] = []

    async def run(self, rounds: int) -> None:
        """Measures `2 * rounds` moves of each kind."""
        async with open_channel(f"unix:{self._fleet.lab.controller_socket('ctl1')}") as channel:
            self._client = Client(channel, DEADLINE_S)
            await self._run(rounds)

    async def _run(self, rounds: int) -> None:
        control = GuestControl(self._fleet.node("h3"), self._guest.ip)
        await control.dirty(DIRTY_MIB, DIRTY_MIB_PER_S)
        for number in range(rounds + 1):
            for series, move in ((self.ours, self._ours), (self.virsh, self._virsh)):
                for source, destination in (("h1", "h2"), ("h2", "h1")):
                    await self._client.settled(self._guest.uuid, partial(_is_on, source), SETTLE_S)
                    self._pauses.clear()
                    total_ms = await move(source, destination)
                    pause_ms = await asyncio.to_thread(self._pauses.pause_ms, source, destination)
                    warm_up = number == 0
                    name = "ours " if series is self.ours else "virsh"
                    click.echo(
                        f"{name} {source}→{destination} total {total_ms:7.1f} ms, downtime {pause_ms:6.1f} ms"
                        f"{'  (warm-up, not counted)' if warm_up else ''}"
                    )
                    if not warm_up:
                        series.total_ms.append(total_ms)
                        series.downtime_ms.append(pause_ms)
                    elif series is self.ours:
                        self.parts.clear()
        status = await control.dirty_off()
        if status.bad_pages:
            raise click.ClickException(f"{status.bad_pages} pages of the guest's memory are wrong")

    async def _ours(self, source: str, destination: str) -> float:
        began = time.monotonic()
        created = await self._client.create_move(self._guest.name, destination)
        accepted = time.monotonic()
        last = await self._client.done(created)
        total_ms = 1000 * (time.monotonic() - began)
        self.parts.append(_parts(last, 1000 * (accepted - began)))
        return total_ms

    async def _virsh(self, source: str, destination: str) -> float:
        command = [
            *("virsh", "migrate", "--live", "--p2p", "--persistent", "--undefinesource", "--unsafe"),
            *(self._guest.name, f"qemu+tcp://10.10.0.{destination[1:]}/system"),
        ]
        node = self._fleet.node(source)
        began = time.monotonic()
        await asyncio.to_thread(node.run, command, "", DEADLINE_S)
        return 1000 * (time.monotonic() - began)

    def report(self) -> dict[str, object]:
        """What is written to out/bench/handoff.json."""
        ratio = {
            "total": round(statistics.median(self.ours.total_ms) / statistics.median(self.virsh.total_ms), 3),
            "downtime": round(statistics.median(self.ours.downtime_ms) / statistics.median(self.virsh.downtime_ms), 3),
        }
        names = self.parts[0].keys()
        medians = {name: round(statistics.median(part[name] for part in self.parts), 1) for name in names}
        return {
            "ours": self.ours.as_report(),
            "virsh": self.virsh.as_report(),
            "ratio": ratio,
            "guest": {
                "memory_mib": MEMORY_MIB,
                "dirty_mib": DIRTY_MIB,
                "dirty_mib_per_s": DIRTY_MIB_PER_S,
                "disk": "raw, shared",
            },
            "load_average": os.getloadavg(),
            "where_ours_went_ms": {"median": medians, "each": self.parts},
        }


def _is_on(host: str, guest: Guest) -> bool:
    return guest.owner.host == host


def _parts(migration: Migration, accept_ms: float) -> dict[str, float]:
    """Time in each state, and in each part of the pause."""
    parts = {"create_call": round(accept_ms, 1)}
    for change, following in zip(migration.timeline, migration.timeline[1:], strict=False):
        lasted = (following.time.ToNanoseconds() - change.time.ToNanoseconds()) / 1e6
        parts[State(change.state).name.lower()] = round(lasted, 1)
    outcome = migration.outcome
    parts["paused_to_held"] = round(outcome.paused_to_held_ms, 1)
    parts["held_to_committed"] = round(outcome.held_to_committed_ms, 1)
    parts["committed_to_running"] = round(outcome.committed_to_running_ms, 1)
    return parts


@click.command()
@click.option("--rounds", default=4, show_default=True, help="Rounds of two moves of each kind; one more warms up.")
def main(rounds: int) -> None:
    """Compares our migration with libvirt's own, in a lab of its own."""
    lab = Lab(
        Path(os.environ.get("HANDOFF_BENCH_DIR") or LAB), Path(os.environ.get("HANDOFF_PREFIX") or DEFAULT_PREFIX)
    )
    fleet = Fleet(lab)
    try:
        fleet.up(hosts=3, controllers=1, etcd=1)
        guest = Guests(fleet).create(GUEST, "h1", MEMORY_MIB)
        sockets = {host: lab.libvirt_socket(host, "a") for host in ("h1", "h2")}
        with watch_pauses(GUEST, sockets) as pauses:
            bench = Bench(fleet, guest, pauses)
            asyncio.run(bench.run(rounds))
    finally:
        fleet.down()
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    report = bench.report()
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    click.echo(f"ratio: {report['ratio']} (targets: total ≤ 1.10, downtime ≤ 1.25); details in {REPORT}")


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("bench: the lab needs root")
    main()
