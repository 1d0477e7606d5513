"""The results: matrix.json, which also lets a soak go on where it ended, and a table to read."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from soak.cell_run import Result
from soak.cells import STANDS_STILL, Cell, expectation
from soak.faults import FAULTS, Blow, KilledTogether, Struck, Victim
from soak.moments import Moment

FOLDER: Final = Path("out/soak")
NOTHING_TO_BREAK: Final = "–"
NOT_RUN: Final = ""


def load(folder: Path) -> dict[str, Result]:
    """The results of an earlier soak, by cell; none when there was none."""
    path = folder / "matrix.json"
    if not path.exists():
        return {}
    return {entry["cell"]: Result(**entry) for entry in json.loads(path.read_text())["cells"]}


def save(folder: Path, results: Mapping[str, Result], seed: int) -> None:
    """Writes both files, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = [dataclasses.asdict(result) for result in results.values()]
    ok = sum(result.ok for result in results.values())
    summary = {"run": len(cells), "ok": ok, "seed": seed, "recovery_ms": recovery_ms(results)}
    _replace(folder / "matrix.json", json.dumps({"summary": summary, "cells": cells}, indent=1) + "\n")
    _replace(folder / "matrix.txt", table(results))


def recovery_ms(results: Mapping[str, Result]) -> dict[str, float]:
    """The slowest returns of a guest to its source after its destination died in the switch, by fault."""
    deaths = (Struck(Victim.DESTINATION_QEMU, Blow.KILL), KilledTogether())
    return {
        fault.name: max(after)
        for fault in deaths
        if (after := list(_outages_ms(results, [Cell(moment, fault).name for moment in STANDS_STILL])))
    }


def _outages_ms(results: Mapping[str, Result], cells: Iterable[str]) -> Iterator[float]:
    """Of those that were run, and whose guest came back."""
    for cell in cells:
        if cell in results and (outage_ms := results[cell].outage_ms) is not None:
            yield outage_ms


def table(results: Mapping[str, Result]) -> str:
    """A row a fault, a column a moment: where the guest ran, and after how long. What is not as it must be is below."""
    columns = [list(Moment)]
    rows = [["", *(str(moment) for moment in columns[0])]]
    rows += [[fault.name, *(_entry(Cell(moment, fault), results) for moment in Moment)] for fault in FAULTS]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    passed = sum(result.ok for result in results.values())
    lines += ["", f"{passed} of {len(results)} cells as they must be. {LEGEND}"]
    for result in results.values():
        lines += [f"{result.cell}: {problem}" for problem in result.problems]
    return "\n".join(lines) + "\n"


LEGEND: Final = (
    "S, D: the guest ran at the source, the destination; lost: the fault ended its only copy. Then the milliseconds "
    "from the fault, or a later silence, until it answered again, 0 when it was never silent; w: it "
    "waited, paused, until the fault was over; !: not as it must be."
)
_SHORT: Final = {"source": "S", "destination": "D", "nowhere": "lost", "": "?"}


def _entry(cell: Cell, results: Mapping[str, Result]) -> str:
    if expectation(cell) is None:
        return NOTHING_TO_BREAK
    result = results.get(cell.name)
    if result is None:
        return NOT_RUN
    after = "" if result.outage_ms is None else f" {result.outage_ms:.0f}"
    return f"{_SHORT[result.where]}{after}{' w' if result.waited else ''}{'' if result.ok else ' !'}"


def _replace(path: Path, text: str) -> None:
    scratch = path.with_suffix(".new")
    scratch.write_text(text)
    scratch.replace(path)
