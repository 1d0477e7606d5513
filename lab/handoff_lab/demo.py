"""`make demo`: the main job on this machine. A fleet, a busy guest with a TCP session to it, a move there and back."""

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from handoff_lab.errors import LabError
from handoff_lab.fleet import Fleet, require_root
from handoff_lab.guest import Guests
from handoff_lab.host import program
from handoff_lab.probe import GuestControl, TcpSession, UdpProbe
from handoff_lab.state import GuestRecord, Lab

GUEST = "demo"
HOME = "h1"
HOSTS = ("h1", "h2", "h3")
REPORT = Path("out/demo/report.json")
# Busy enough that memory and disk are written throughout the move, and light enough for two cores without KVM.
DIRTY_MIB, DIRTY_MIB_PER_S = 24, 12
JOURNAL_MIB_PER_S, JOURNAL_SPAN_MIB = 1, 32
MIGRATE_DEADLINE_S = 300

console = Console(highlight=False)


@dataclass(frozen=True, slots=True)
class Move:
    """One line of the report."""

    guest: str
    # "from" in the report: a keyword here.
    source: str
    to: str
    state: str
    total_ms: int
    downtime_ms: float
    network_gap_ms: float
    ram_bytes: int

    def as_report(self) -> dict[str, str | int | float]:
        """The line with the report's own names."""
        fields = asdict(self)
        return {"guest": fields.pop("guest"), "from": fields.pop("source"), **fields}


class Demo:
    """The fleet, the guest, and what happens to it."""

    def __init__(self, fleet: Fleet, guest: GuestRecord) -> None:
        self._fleet = fleet
        self._guest = guest
        # An earlier demo, or whoever played on after it, may have left the guest anywhere.
        self._here = Guests(fleet).running_on(GUEST).name
        self._there, third = (name for name in HOSTS if name != self._here)
        self._observer = fleet.host(third).node
        self._environment = {**os.environ, **fleet.environment()}

    async def run(self) -> tuple[list[Move], bool]:
        """Moves the guest away and back; returns both moves, and whether everything in the guest survived."""
        control = GuestControl(self._observer, self._guest.ip)
        before = await control.status()
        await control.dirty(DIRTY_MIB, DIRTY_MIB_PER_S)
        await control.journal_start(JOURNAL_MIB_PER_S, JOURNAL_SPAN_MIB)
        console.print(
            f"{GUEST} writes {DIRTY_MIB_PER_S} MiB/s of memory and {JOURNAL_MIB_PER_S} MiB/s of disk; "
            f"{self._observer.name} holds a TCP session to it\n"
        )
        moves = []
        async with TcpSession(self._observer, self._guest.ip) as session:
            for source, destination in ((self._here, self._there), (self._there, self._here)):
                moves.append(await self._move(source, destination))
            tcp = await session.close()
        await control.journal_stop()
        check = await control.journal_verify()
        dirtier = await control.dirty_off()
        after = await control.status()
        survived = {
            f"TCP session ({tcp.counters} counters in order, {tcp.wrong} wrong)": tcp.survived,
            f"disk ({check.checked} checksummed records reread)": check.intact,
            f"memory ({dirtier.verified_pages} pages verified, {dirtier.bad_pages} bad)": dirtier.bad_pages == 0,
            "the guest has not rebooted": after.boot_id == before.boot_id,
        }
        for what, fine in survived.items():
            console.print(f"[green]survived[/]  {what}" if fine else f"[bold red]LOST[/]      {what}")
        return moves, all(survived.values())

    async def _move(self, source: str, destination: str) -> Move:
        async with UdpProbe(self._fleet.lab, self._observer, self._guest.ip) as probe:
            await self._show("migrate", GUEST, "--to", destination, "--wait")
            udp = await probe.stop()
        newest = (await self._handoff("list", "--guest", GUEST))["migrations"][0]
        outcome = newest["outcome"]
        console.print()
        await self._show("show", newest["id"])
        console.print(
            f"Network gap {udp.longest_gap_ms:.0f} ms, seen by {self._observer.name} with a datagram each ms "
            f"({udp.lost} of {udp.sent} lost, {udp.duplicated} duplicated)\n"
        )
        return Move(
            guest=GUEST,
            source=source,
            to=destination,
            state=newest["state"].removeprefix("MIGRATION_STATE_"),
            total_ms=int(outcome["total_ms"]),
            downtime_ms=outcome["downtime_ms"],
            network_gap_ms=udp.longest_gap_ms,
            ram_bytes=int(outcome["ram_bytes"]),
        )

    async def _show(self, *arguments: str) -> None:
        """Runs the command as an operator would, on our own terminal."""
        console.print(f"[bold]$ handoff {' '.join(arguments)}[/]")
        console.file.flush()
        command = [str(program("handoff")), *arguments]
        await asyncio.to_thread(subprocess.run, command, env=self._environment, check=False, timeout=MIGRATE_DEADLINE_S)

    async def _handoff(self, *arguments: str) -> dict[str, Any]:
        done = await asyncio.to_thread(
            subprocess.run,
            [str(program("handoff")), *arguments, "-o", "json"],
            env=self._environment,
            check=True,
            text=True,
            stdout=subprocess.PIPE,
        )
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


def summary(moves: list[Move]) -> Table:
    """The moves side by side."""
    table = Table(box=None, pad_edge=False)
    for name in ("MOVE", "STATE", "TOTAL", "GUEST PAUSE", "NETWORK GAP", "MEMORY SENT"):
        table.add_column(name, justify="left" if name in ("MOVE", "STATE") else "right")
    for move in moves:
        table.add_row(
            f"{move.source} → {move.to}",
            move.state,
            f"{move.total_ms / 1000:.2f} s",
            f"{move.downtime_ms:.0f} ms",
            f"{move.network_gap_ms:.0f} ms",
            f"{move.ram_bytes / (1 << 20):.0f} MiB",
        )
    return table


def main() -> None:
    """Brings the lab up, shows the main job, and leaves the lab up. Exits 1 when anything was lost."""
    try:
        require_root()
        fleet = Fleet(Lab.from_environment())
        with console.status("bringing up three hosts, two controllers and etcd…"):
            fleet.up(hosts=3, agents=True)
        with console.status("booting a guest…"):
            guest = Guests(fleet).create(GUEST, HOME)
        moves, survived = asyncio.run(Demo(fleet, guest).run())
    except LabError as error:
        sys.exit(f"demo: {error}")
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    report = {"migrations": [move.as_report() for move in moves], "sessions_survived": survived}
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    console.print()
    console.print(summary(moves))
    console.print(f"\nThe figures are in {REPORT}. The lab stays up; play on with\n")
    console.print('  eval "$(.venv/bin/handoff-lab env)"', markup=False)
    console.print(f"  handoff guests; handoff migrate {GUEST} --to h3 --wait", markup=False)
    console.print("\nand end it with `handoff-lab down`.")
    if not survived or any(move.state != "DONE" for move in moves):
        sys.exit(1)


if __name__ == "__main__":
    main()
