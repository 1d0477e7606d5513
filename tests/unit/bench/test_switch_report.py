"""What `make bench-switch` makes of its readings."""

import io

from rich.console import Console

from bench.switch import PARTS, Reading, Session, View, missed_ticks_ms, spread, summary, tables, targets
from handoff_lab.probe import Stall


def view(gap_ms: float, beside_ms: float, lost: int = 0, duplicated: int = 0) -> View:
    return View(gap_ms, beside_ms, beside_ms + 5, 1000, lost, duplicated, 0, 20)


def reading(way: str, host: View, gateway: View, *, lost_pings: int = 0, cut_off: bool = False) -> Reading:
    return Reading(
        way=way,
        source="h1",
        destination="h2",
        total_ms=900.0,
        pause_ms=50.0,
        still_ms=45.0,
        inexact_ms=0.3,
        stop_resume_ms=49.0,
        host=host,
        gateway=gateway,
        ping=host,
        gateway_ping=view(59.0, 9.0, lost=lost_pings),
        tcp=Session(60.0, survived=True),
        gateway_tcp=Session(61.0, survived=not cut_off),
        parts_ms=dict.fromkeys(PARTS, 9.0),
        by_record_ms={"paused_to_held": 30.0},
    )


def test_spread_of_twenty() -> None:
    values = [float(n) for n in range(1, 21)]
    assert spread(values) == {"median": 10.5, "p95": 19.0, "max": 20.0}
    assert spread([3.0]) == {"median": 3.0, "p95": 3.0, "max": 3.0}


def stall(began_ms: float, length_ms: float) -> Stall:
    return Stall(int(began_ms * 1e6), int(length_ms * 1e6))


def test_missed_ticks_are_those_around_the_pause() -> None:
    before, at, after, later = stall(50, 4), stall(99.5, 31), stall(132, 9), stall(300, 20)
    assert missed_ticks_ms([before, later], 100_000_000) == 0
    assert missed_ticks_ms([before, at, later], 100_000_000) == 31
    assert missed_ticks_ms([later, after, at, before], 100_000_000) == 41.5


def test_targets_are_of_both_views() -> None:
    fine = reading("redirect", view(58.0, 8.0), view(59.0, 9.0))
    assert all(targets([fine] * 3).values())
    slow_outside = reading("redirect", view(58.0, 8.0), view(120.0, 70.0, lost=1))
    missed = {name for name, met in targets([slow_outside] * 3).items() if not met}
    assert missed == {
        "gateway: gap less pause ≤ 10 ms at the median",
        "gateway: gap < 100 ms at the median",
        "gateway: no frame lost",
    }
    doubled = reading("redirect", view(58.0, 8.0, duplicated=1), view(59.0, 9.0), lost_pings=1, cut_off=True)
    missed = {name for name, met in targets([fine, fine, doubled]).items() if not met}
    assert missed == {
        "third host: no frame twice",
        "third host: no ping lost or answered twice",
        "gateway: no ping lost or answered twice",
        "gateway: every TCP session survived",
    }


def test_summary_and_tables_name_every_part() -> None:
    found = {"redirect": [reading("redirect", view(58.0, 8.0), view(59.0, 9.0))]}
    parts = summary(found["redirect"])["parts_ms"]
    assert isinstance(parts, dict)
    assert tuple(parts) == PARTS
    console = Console(width=200, file=io.StringIO(), record=True)
    for table in tables(found):
        console.print(table)
    assert "58.0 / 58.0 / 58.0" in console.export_text()
