"""Which records may be forgotten."""

from datetime import timedelta

import pytest
from records import EPOCH, guest, migration

from handoff.controller.v1.migrations_pb2 import Migration
from handoff_controller.machine import FINAL, State
from handoff_controller.retention import forgettable, lost_for_long
from handoff_controller.settings import RetentionSettings

DAY_S = 86400
KEEP = RetentionSettings(count=2, age_s=10 * DAY_S)
NOW = EPOCH + timedelta(days=100)
BOTH_SEEN = {"h1": frozenset[str](), "h2": frozenset[str]()}


def ended(number: int, *, days_ago: float = 50, state: State = State.DONE) -> Migration:
    made = migration(f"m{number}", state=state, created_s=number)
    if state in FINAL:
        made.end_time.FromDatetime(NOW - timedelta(days=days_ago))
    return made


def forgotten(*migrations: Migration, seen: dict[str, frozenset[str]] = BOTH_SEEN) -> list[str]:
    return [one.id for one in forgettable(migrations, KEEP, NOW, ("h1", "h2"), seen)]


def test_the_newest_are_kept_however_old() -> None:
    assert forgotten(*(ended(number) for number in range(5))) == ["m0", "m1", "m2"]


def test_the_young_are_kept_however_many() -> None:
    assert forgotten(ended(0), ended(1, days_ago=9), ended(2), ended(3)) == ["m0"]


@pytest.mark.parametrize("state", [state for state in State if state not in FINAL], ids=lambda state: state.name)
def test_what_is_under_way_is_kept(state: State) -> None:
    assert forgotten(ended(0, state=state), ended(1), ended(2)) == []


def test_what_a_host_may_still_hold_something_of_is_kept() -> None:
    migrations = [ended(number) for number in range(3)]
    assert forgotten(*migrations, seen={"h1": frozenset(), "h2": frozenset({"m0"})}) == []
    assert forgotten(*migrations, seen={"h1": frozenset()}) == []


def test_a_host_that_is_not_configured_any_more_holds_nothing_back() -> None:
    migrations = [ended(number) for number in range(3)]
    kept_out = forgettable(migrations, KEEP, NOW, ("h1",), {"h1": frozenset()})
    assert [one.id for one in kept_out] == ["m0"]


def test_a_guest_that_was_lost_long_ago() -> None:
    lost = guest()
    lost.loss.certain = True
    lost.loss.time.FromDatetime(NOW - timedelta(days=11))
    fresh = guest(uuid="other")
    fresh.loss.certain = True
    fresh.loss.time.FromDatetime(NOW - timedelta(days=9))
    assert lost_for_long([lost, fresh, guest(uuid="third")], KEEP, NOW) == (guest(),)
