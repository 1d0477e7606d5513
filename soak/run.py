"""`make soak`: runs the matrix, or part of it, on one fleet, and writes out/soak/matrix.json and matrix.txt."""

import asyncio
import fnmatch
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

from handoff_lab.fleet import Fleet
from handoff_lab.state import DEFAULT_PREFIX, Lab
from soak import report
from soak.cell_run import Result
from soak.cells import Cell, matrix, subset
from soak.scene import LANES, Lane
from soak.stage import Stage

LAB: Final = Path("/var/tmp/handoff-soak")  # noqa: S108


@dataclass(frozen=True, slots=True)
class Choice:
    """Which cells, in which order."""

    seed: int = 0
    count: int = 0
    """This many that have every moment and fault between them; 0: all."""
    only: tuple[str, ...] = ()
    """Patterns of names, such as "committed:*"."""

    def cells(self) -> Sequence[Cell]:
        """The cells, by the seed's dice."""
        cells = matrix()
        if self.only:
            cells = tuple(cell for cell in cells if any(fnmatch.fnmatch(cell.name, pattern) for pattern in self.only))
        if self.count:
            return subset(cells, self.count, self.seed)
        return random.Random(self.seed).sample(cells, len(cells))


async def soak(
    fleet: Fleet, lanes: Sequence[Lane], cells: Sequence[Cell], told: Callable[[Result], None], until: float
) -> None:
    """Runs cells on a fleet that it founds; `told` hears of each. Begins none after `until`, by the monotonic clock."""
    async with Stage(fleet, lanes) as stage:
        await stage.run(cells, told, lambda: time.monotonic() < until)


@click.command()
@click.option("--seed", default=0, show_default=True, help="Chooses the order, and the cells of a part.")
@click.option("--cells", "count", default=0, help="Only so many, with every state and every fault among them.")
@click.option("--only", multiple=True, metavar="MOMENT:FAULT", help="Only these; * stands for anything. Repeatable.")
@click.option("--lane", type=click.Choice([lane.name for lane in LANES]), help="All in this one; see soak/scene.py.")
@click.option("--resume", is_flag=True, help="Goes on with what the last soak has not run, or not passed.")
@click.option("--minutes", default=0.0, help="Begins no further cell after so long.")
@click.option("--list", "listing", is_flag=True, help="Names the cells, and runs none.")
def main(
    seed: int, count: int, only: tuple[str, ...], lane: str | None, resume: bool, minutes: float, listing: bool
) -> None:
    """Every state of a migration × every fault, on a fleet of its own."""
    cells = Choice(seed, count, only).cells()
    known = report.load(report.FOLDER) if resume else {}
    cells = [cell for cell in cells if cell.name not in known or not known[cell.name].ok]
    cells.sort(key=lambda cell: cell.name in known)
    if listing:
        click.echo("\n".join(cell.name for cell in cells))
        return
    if os.geteuid() != 0:
        sys.exit("soak: the lab needs root")
    results = dict(known)

    def told(result: Result) -> None:
        results[result.cell] = result
        report.save(report.FOLDER, results, seed)
        after = "" if result.outage_ms is None else f", away for {result.outage_ms:.0f} ms"
        click.echo(
            f"{'ok    ' if result.ok else 'BROKEN'} {result.cell}: {result.where}{after} "
            f"({result.seconds} s, lane {result.lane})"
        )
        for problem in result.problems:
            click.echo(f"         {problem}")

    lab = Lab(Path(os.environ.get("HANDOFF_SOAK_DIR") or LAB), Path(os.environ.get("HANDOFF_PREFIX") or DEFAULT_PREFIX))
    fleet = Fleet(lab)
    lanes = [one for one in LANES if lane in (None, one.name)]
    until = time.monotonic() + 60 * minutes if minutes else float("inf")
    try:
        asyncio.run(soak(fleet, lanes, cells, told, until))
    finally:
        fleet.down()
    broken = [result.cell for result in results.values() if not result.ok]
    click.echo(f"{len(results) - len(broken)} of {len(results)} cells as they must be; see {report.FOLDER}/matrix.txt")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
