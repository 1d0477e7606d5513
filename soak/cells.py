"""The matrix: each moment with each fault, and what must come of it. Pure."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, assert_never

from handoff_controller.etcd.lease import MIN_TTL_S
from handoff_controller.machine import State
from soak.faults import (
    FAULTS,
    FREEZE_S,
    Blow,
    Cut,
    DiskFull,
    Fault,
    KilledTogether,
    Lasting,
    Link,
    Struck,
    Victim,
)
from soak.moments import MOMENTS, Moment

SWITCH_DEADLINE_S: Final = 2.0
"""The default of MigrationOptions.switch_deadline."""
RESTARTED_S: Final = 4.0
"""A killed daemon is back and at work: a second until it is started, then its own start on a busy machine."""
ETCD_ELECTION_S: Final = 6.0
"""Twice the lab's longest election, and the watch that has to find another member."""
ANSWER_S: Final = 2.0
"""How long a QEMU that is to be told to run is waited for."""
PATIENCE_S: Final = 5.0
"""How long the leader waits for an agent while the guest may be paused."""
SLACK_S: Final = 1.0
"""What a busy machine may add to any of it."""


class Where(StrEnum):
    """Where the guest must run in the end."""

    SOURCE = "source"
    DESTINATION = "destination"
    EITHER = "either"
    """At one of both, whichever the record names."""
    LOST = "lost"
    """Nowhere: the fault ended the only copy that was allowed to run."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a cell must come to. `outage_s`: the longest that the guest may be away; None for one that is lost."""

    where: Where
    outage_s: float | None
    waits: bool = False
    """Nobody can know which copy may run: the guest is paused and the record says so, until the link is back."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One fault at one moment."""

    moment: Moment
    fault: Fault

    @property
    def name(self) -> str:
        """Such as "copying:kill-leader"."""
        return f"{self.moment}:{self.fault.name}"


BEFORE_THE_PAUSE: Final = frozenset({Moment.PLANNED, Moment.PREPARING, Moment.COPYING})
OWNED_BY_DESTINATION: Final = frozenset({Moment.COMMITTED, Moment.FINISHING})
STANDS_STILL: Final = frozenset({Moment.PAUSED, Moment.HELD, Moment.COMMITTED})


def matrix() -> tuple[Cell, ...]:
    """Every cell that has something to break, state by state."""
    cells = (Cell(moment, fault) for state in State for moment in MOMENTS.get(state, ()) for fault in FAULTS)
    return tuple(cell for cell in cells if expectation(cell) is not None)


def expectation(cell: Cell) -> Expectation | None:
    """What must come of a cell; None where there is nothing to break.

    Of a guest with a tenant's port and local disks the same: its frames follow it before it stops, and turn back in no
    time; its mirrors end within the pause and its deadline, and given up over a dead link they keep it for half a
    second, which is in the slack; where it runs in the end its images are whole, for the source's are removed only
    once the destination has it.
    """
    match cell.fault:
        case Struck(victim, blow):
            return _struck(cell.moment, victim, blow)
        case KilledTogether():
            return _killed_together(cell.moment)
        case Cut(link, lasting):
            return _cut(cell.moment, link, lasting)
        case DiskFull():
            return _disk_full(cell.moment)
        case _:
            assert_never(cell.fault)


def home(moment: Moment) -> Where:
    """Where a migration ends that a passing fault only delays."""
    return Where.SOURCE if moment is Moment.ABORTING else Where.DESTINATION


def _lenient_home(moment: Moment) -> Where:
    """The same, where giving up in time is right as well."""
    return Where.EITHER if moment in BEFORE_THE_PAUSE | {Moment.PAUSED, Moment.HELD} else home(moment)


def _struck(moment: Moment, victim: Victim, blow: Blow) -> Expectation | None:
    frozen_s = FREEZE_S if blow is Blow.FREEZE else 0.0
    match victim:
        case Victim.SOURCE_QEMU:
            return _source_qemu(moment, blow)
        case Victim.DESTINATION_QEMU:
            return _destination_qemu(moment, blow)
        case Victim.SOURCE_AGENT | Victim.SOURCE_LIBVIRTD:
            # Held up at the source, the leader may give up; the guest runs again when the source answers.
            stops = moment in (Moment.PAUSED, Moment.HELD) or (moment is Moment.COPYING and blow is Blow.FREEZE)
            away_s = max(frozen_s, RESTARTED_S) + PATIENCE_S if stops else 0.0
            return Expectation(_lenient_home(moment), SLACK_S + away_s)
        case Victim.DESTINATION_AGENT | Victim.DESTINATION_LIBVIRTD:
            stops = moment in STANDS_STILL | {Moment.COPYING}
            away_s = max(frozen_s, RESTARTED_S) + PATIENCE_S if stops else 0.0
            return Expectation(_lenient_home(moment), SLACK_S + away_s)
        case Victim.LEADER:
            away_s = MIN_TTL_S + 2.0 if moment in STANDS_STILL else 0.0
            where = Where.EITHER if moment is Moment.PAUSED else home(moment)
            return Expectation(where, SLACK_S + away_s)
        case Victim.ETCD_FOLLOWER | Victim.ETCD_LEADER:
            away_s = ETCD_ELECTION_S if moment in STANDS_STILL | {Moment.COPYING} else 0.0
            return Expectation(_lenient_home(moment), SLACK_S + away_s)
        case _:
            assert_never(victim)


def _source_qemu(moment: Moment, blow: Blow) -> Expectation:
    if blow is Blow.KILL:
        is_spare = moment is Moment.HELD or moment in OWNED_BY_DESTINATION
        # Once the destination has everything, the source's copy is not needed any more.
        return Expectation(Where.DESTINATION, SLACK_S) if is_spare else Expectation(Where.LOST, None)
    if moment in (Moment.HELD, Moment.COMMITTED, Moment.FINISHING):
        return Expectation(Where.DESTINATION, SLACK_S)
    return Expectation(_lenient_home(moment), FREEZE_S + SLACK_S)


def _destination_qemu(moment: Moment, blow: Blow) -> Expectation | None:
    if moment is Moment.PLANNED:
        return None
    if blow is Blow.KILL:
        owns = moment is Moment.FINISHING
        return Expectation(Where.LOST, None) if owns else Expectation(Where.SOURCE, 1.0 + SLACK_S)
    if moment is Moment.FINISHING:
        return Expectation(Where.DESTINATION, FREEZE_S + SLACK_S)
    if moment in (Moment.HELD, Moment.COMMITTED):
        # One that does not answer in time is not told to run: it is killed, and the source goes on.
        return Expectation(Where.SOURCE, ANSWER_S + SLACK_S)
    where = Where.SOURCE if moment in (Moment.PAUSED, Moment.ABORTING) else Where.EITHER
    return Expectation(where, SWITCH_DEADLINE_S + 1.0 + SLACK_S)


def _killed_together(moment: Moment) -> Expectation | None:
    alone = _destination_qemu(moment, Blow.KILL)
    if alone is None or alone.outage_s is None:
        return alone
    # The next leader prepares anew where the last one's order has not been answered.
    where = Where.EITHER if moment is Moment.PREPARING else alone.where
    return Expectation(where, MIN_TTL_S + 2.0 + SLACK_S if moment in STANDS_STILL else alone.outage_s)


def _cut(moment: Moment, link: Link, lasting: Lasting) -> Expectation:
    match link:
        case Link.BETWEEN_HOSTS:
            return _hosts_apart(moment, lasting)
        case Link.TO_SOURCE:
            return _source_out_of_reach(moment, lasting)
        case Link.TO_DESTINATION:
            return _destination_out_of_reach(moment, lasting)
        case _:
            assert_never(link)


def _hosts_apart(moment: Moment, lasting: Lasting) -> Expectation:
    if moment is Moment.PAUSED:
        return Expectation(Where.SOURCE, SWITCH_DEADLINE_S + 1.0 + SLACK_S)
    if moment in BEFORE_THE_PAUSE:
        where = Where.SOURCE if lasting is Lasting.FOR_GOOD else Where.EITHER
        return Expectation(where, SWITCH_DEADLINE_S + SLACK_S)
    # The rest does not need the link.
    where = Where.DESTINATION if moment is Moment.HELD else home(moment)
    return Expectation(where, SLACK_S)


def _source_out_of_reach(moment: Moment, lasting: Lasting) -> Expectation:
    if moment in OWNED_BY_DESTINATION:
        return Expectation(Where.DESTINATION, SLACK_S)
    if moment in (Moment.PAUSED, Moment.HELD):
        # The source may be held and may as well have given up: only it can tell.
        waits = lasting is Lasting.FOR_GOOD
        return Expectation(Where.EITHER, FREEZE_S + PATIENCE_S + SLACK_S, waits=waits)
    if moment is Moment.COPYING and lasting is Lasting.A_WHILE:
        return Expectation(Where.EITHER, SWITCH_DEADLINE_S + SLACK_S)
    # One that waits for its turn goes its way after the fault.
    is_over = lasting is Lasting.FOR_GOOD and moment is not Moment.PLANNED
    where = Where.SOURCE if is_over else _lenient_home(moment)
    return Expectation(where, SLACK_S)


def _destination_out_of_reach(moment: Moment, lasting: Lasting) -> Expectation:
    for_good = lasting is Lasting.FOR_GOOD
    if moment in (Moment.PAUSED, Moment.HELD):
        return Expectation(Where.EITHER, FREEZE_S + PATIENCE_S + SLACK_S, waits=for_good)
    if moment is Moment.COMMITTED:
        return Expectation(Where.DESTINATION, FREEZE_S + PATIENCE_S + SLACK_S, waits=for_good)
    if moment in BEFORE_THE_PAUSE:
        return Expectation(Where.SOURCE if for_good else Where.EITHER, SLACK_S)
    return Expectation(home(moment), SLACK_S)


def _disk_full(moment: Moment) -> Expectation:
    if moment is Moment.PLANNED:
        # It may be over by the time that the migration's turn comes.
        return Expectation(Where.EITHER, SLACK_S)
    if moment is Moment.FINISHING:
        return Expectation(Where.DESTINATION, SLACK_S)
    if moment is Moment.ABORTING:
        return Expectation(Where.SOURCE, SLACK_S)
    return Expectation(Where.EITHER, SLACK_S + PATIENCE_S)


def subset(cells: Sequence[Cell], count: int, seed: int) -> tuple[Cell, ...]:
    """At least `count` cells that have every moment and every fault between them, the quick ones first in line.

    The same seed gives the same cells. Faults that take their time come once; what else is needed are kills.
    """
    dice = random.Random(seed)
    pool = list(cells)
    dice.shuffle(pool)
    pool.sort(key=cost_s)
    chosen: list[Cell] = []
    for cell in sorted(pool, key=lambda cell: -min(cost_s(other) for other in pool if other.fault == cell.fault)):
        if all(cell.fault != other.fault for other in chosen):
            seen = [other.moment for other in chosen]
            same = [other for other in pool if other.fault == cell.fault]
            chosen.append(min(same, key=lambda other: (cost_s(other), seen.count(other.moment))))
    for moment in Moment:
        if all(moment != other.moment for other in chosen):
            chosen.append(next(cell for cell in pool if cell.moment is moment))
    for cell in pool:
        if len(chosen) >= count:
            break
        if cell not in chosen:
            chosen.append(cell)
    return tuple(sorted(chosen, key=cells.index))


def cost_s(cell: Cell) -> float:
    """About how long a cell takes beyond a move without a fault."""
    fault = cell.fault
    found = expectation(cell)
    boots_s = 6.0 if found is not None and found.where is Where.LOST else 0.0
    if isinstance(fault, Cut) and fault.lasting is Lasting.FOR_GOOD:
        return _told_after_s(cell.moment, fault.link)
    lasts = isinstance(fault, Cut) or (isinstance(fault, Struck) and fault.blow is Blow.FREEZE)
    waits_s = FREEZE_S if lasts else 0.0
    planned_s = 6.0 if cell.moment is Moment.PLANNED else 0.0
    victims = fault.victims if isinstance(fault, KilledTogether) else ()
    victims = (fault.victim,) if isinstance(fault, Struck) else victims
    leads_s = float(MIN_TTL_S) if Victim.LEADER in victims else 0.0
    return boots_s + max(waits_s, leads_s) + planned_s


def _told_after_s(moment: Moment, link: Link) -> float:
    """How long it takes until a migration is over, or says what it waits for, with a link that stays cut."""
    if link is Link.BETWEEN_HOSTS:
        return 15.0 if moment in BEFORE_THE_PAUSE else 2.0
    asks_s = {
        (Moment.ABORTING, Link.TO_SOURCE): 12.0,
        (Moment.PAUSED, Link.TO_SOURCE): 17.0,
        (Moment.PAUSED, Link.TO_DESTINATION): 12.0,
        (Moment.HELD, Link.TO_DESTINATION): 12.0,
        (Moment.COMMITTED, Link.TO_DESTINATION): 12.0,
    }
    return asks_s.get((moment, link), 35.0)
