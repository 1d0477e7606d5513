"""The results: read back as they were written, and readable."""

from dataclasses import replace
from pathlib import Path

from soak import report
from soak.cell_run import Result
from soak.cells import Cell
from soak.faults import Blow, Struck, Victim
from soak.moments import Moment

GOOD = Result(
    cell="copying:kill-leader",
    moment="copying",
    fault="kill-leader",
    expected="destination",
    ok=True,
    state="DONE",
    where="destination",
    outage_ms=12.4,
)
BAD = Result(
    cell="committed:kill-leader",
    moment="committed",
    fault="kill-leader",
    expected="destination",
    where="nowhere",
    problems=["the guest does not run"],
)


def test_results_are_read_back(tmp_path: Path) -> None:
    results = {result.cell: result for result in (GOOD, BAD)}
    report.save(tmp_path, results, seed=3)
    assert report.load(tmp_path) == results


def test_there_may_be_no_results(tmp_path: Path) -> None:
    assert report.load(tmp_path) == {}


def test_the_table_says_where_and_after_how_long() -> None:
    text = report.table({result.cell: result for result in (GOOD, BAD)})
    row = next(line for line in text.splitlines() if line.startswith("kill-leader"))
    assert "D 12" in row
    assert "lost !" in row
    assert "committed:kill-leader: the guest does not run" in text
    assert "1 of 2 cells" in text


def test_what_was_not_run_has_no_time_of_recovery() -> None:
    assert report.recovery_ms({GOOD.cell: GOOD}) == {}
    died = [
        replace(GOOD, cell=f"{moment}:kill-destination-qemu", outage_ms=outage_ms)
        for moment, outage_ms in ((Moment.PAUSED, 310.0), (Moment.HELD, 720.5), (Moment.COMMITTED, None))
    ]
    assert report.recovery_ms({result.cell: result for result in died}) == {"kill-destination-qemu": 720.5}


def test_names_of_cells_are_those_of_results() -> None:
    assert Cell(Moment.COPYING, Struck(Victim.LEADER, Blow.KILL)).name == GOOD.cell
