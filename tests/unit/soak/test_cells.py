"""The matrix covers every state and every fault, and each cell has an answer."""

import pytest

from handoff_controller.machine import FINAL, PHASES, State
from soak.cells import Cell, Where, cost_s, expectation, home, matrix, subset
from soak.faults import FAULTS, Blow, Cut, KilledTogether, Lasting, Link, Struck, Victim, is_for_good
from soak.moments import MOMENTS, STATE_OF, Moment

KILLED = {victim: Struck(victim, Blow.KILL) for victim in Victim}
FROZEN = {victim: Struck(victim, Blow.FREEZE) for victim in Victim}
NEVER = [
    # (moment, fault) for which there is nothing to break.
    (Moment.PLANNED, KILLED[Victim.DESTINATION_QEMU]),
    (Moment.PLANNED, FROZEN[Victim.DESTINATION_QEMU]),
    (Moment.PLANNED, KilledTogether()),
]


def expected_where(moment: Moment, fault: Struck | Cut) -> Where:
    found = expectation(Cell(moment, fault))
    assert found is not None
    return found.where


def test_every_live_state_has_its_moments() -> None:
    assert set(MOMENTS) == set(PHASES) == set(State) - FINAL
    assert set(STATE_OF) == set(Moment)
    assert sum(len(moments) for moments in MOMENTS.values()) == len(Moment)


def test_every_state_meets_every_fault() -> None:
    cells = matrix()
    assert len(cells) == len(set(cells)) == len(Moment) * len(FAULTS) - len(NEVER)
    assert {(cell.moment, cell.fault) for cell in cells} | set(NEVER) == {(m, f) for m in Moment for f in FAULTS}
    assert len({cell.name for cell in cells}) == len(cells)


def test_every_fault_is_in_the_list() -> None:
    assert {(f.victim, f.blow) for f in FAULTS if isinstance(f, Struck)} == {(v, b) for v in Victim for b in Blow}
    assert {(f.link, f.lasting) for f in FAULTS if isinstance(f, Cut)} == {(k, t) for k in Link for t in Lasting}
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("cell", matrix(), ids=lambda cell: cell.name)
def test_only_the_death_of_the_copy_that_counts_loses_a_guest(cell: Cell) -> None:
    found = expectation(cell)
    assert found is not None
    before_held = cell.moment not in (Moment.HELD, Moment.COMMITTED, Moment.FINISHING)
    runs_there = cell.moment is Moment.FINISHING
    fatal = {
        KILLED[Victim.SOURCE_QEMU]: before_held,
        KILLED[Victim.DESTINATION_QEMU]: runs_there,
        KilledTogether(): runs_there,
    }
    assert (found.where is Where.LOST) is fatal.get(cell.fault, False)
    assert (found.outage_s is None) is (found.where is Where.LOST)


@pytest.mark.parametrize("cell", matrix(), ids=lambda cell: cell.name)
def test_a_guest_waits_only_for_a_link_that_stays_cut_in_the_switch(cell: Cell) -> None:
    found = expectation(cell)
    assert found is not None
    if found.waits:
        assert is_for_good(cell.fault)
        assert STATE_OF[cell.moment] in (State.SWITCHING, State.COMMITTED)


@pytest.mark.parametrize("moment", [Moment.PREPARING, Moment.COPYING, Moment.PAUSED, Moment.HELD, Moment.COMMITTED])
def test_a_destination_that_dies_before_it_ran_leaves_the_guest_at_the_source(moment: Moment) -> None:
    assert expected_where(moment, KILLED[Victim.DESTINATION_QEMU]) is Where.SOURCE


@pytest.mark.parametrize("moment", [Moment.COMMITTED, Moment.FINISHING])
def test_after_the_commit_there_is_only_forward(moment: Moment) -> None:
    for fault in FAULTS:
        if fault in (KILLED[Victim.DESTINATION_QEMU],) or not isinstance(fault, Struck | Cut):
            continue
        if moment is Moment.COMMITTED and fault == Struck(Victim.DESTINATION_QEMU, Blow.FREEZE):
            continue  # not told to run, and killed
        assert expected_where(moment, fault) is Where.DESTINATION


def test_an_abort_ends_at_the_source() -> None:
    assert {expected_where(Moment.ABORTING, fault) for fault in FAULTS if isinstance(fault, Cut)} == {Where.SOURCE}
    assert home(Moment.ABORTING) is Where.SOURCE


@pytest.mark.parametrize("seed", range(20))
def test_a_part_has_every_moment_and_every_fault(seed: int) -> None:
    part = subset(matrix(), 25, seed)
    assert len(part) == len(set(part)) >= 25
    assert {cell.moment for cell in part} == set(Moment)
    assert {cell.fault for cell in part} == set(FAULTS)
    assert part == subset(matrix(), 25, seed)


def test_a_part_takes_the_quick_cells() -> None:
    part = subset(matrix(), 25, 0)
    assert sum(map(cost_s, part)) < 180
