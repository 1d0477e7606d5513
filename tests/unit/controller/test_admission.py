import pytest
from records import migration

from handoff_controller.admission import admit
from handoff_controller.machine import FINAL, State
from handoff_controller.settings import AdmissionSettings

ONE = AdmissionSettings()
BEGUN = [state for state in State if state not in FINAL and state is not State.PLANNED]


def test_the_first_of_a_pair_begins_and_the_others_are_told_who_is_before_them() -> None:
    verdicts = admit([migration("b", created_s=2), migration("a", created_s=1)], ONE)

    assert verdicts["a"].admitted
    assert not verdicts["b"].admitted
    assert verdicts["b"].reason == "a is moving between h1 and h2 (admission.max_parallel_per_pair is 1)"


def test_same_age_goes_by_id() -> None:
    verdicts = admit([migration("b"), migration("a")], ONE)

    assert [verdicts[name].admitted for name in ("a", "b")] == [True, False]


@pytest.mark.parametrize("state", BEGUN)
def test_one_that_has_begun_holds_the_pair_both_ways(state: State) -> None:
    begun = migration("a", "h1", "h2", state, created_s=9)

    assert not admit([begun, migration("b", "h2", "h1")], ONE)["b"].admitted


@pytest.mark.parametrize("state", [state for state in State if state in FINAL])
def test_one_that_has_ended_holds_nothing(state: State) -> None:
    verdicts = admit([migration("a", state=state), migration("b")], ONE)

    assert verdicts["b"].admitted
    assert "a" not in verdicts


def test_another_pair_does_not_wait() -> None:
    verdicts = admit([migration("a"), migration("b", "h1", "h3"), migration("c", "h3", "h2")], ONE)

    assert all(verdict.admitted for verdict in verdicts.values())


def test_as_many_as_the_setting_says() -> None:
    settings = AdmissionSettings(max_parallel_per_pair=2)
    waiting = [migration(name, created_s=at) for at, name in enumerate("bcd")]

    verdicts = admit([migration("a", state=State.COPYING), *waiting], settings)

    assert [verdicts[name].admitted for name in "bcd"] == [True, False, False]


def test_an_admitted_one_holds_its_place_before_its_record_says_so() -> None:
    older, admitted = migration("a", created_s=1), migration("b", created_s=2)

    verdicts = admit([older, admitted], ONE, {"b"})

    assert "b" not in verdicts
    assert not verdicts["a"].admitted


def test_nothing_planned_nothing_judged() -> None:
    assert admit([], ONE) == {}
