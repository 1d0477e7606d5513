"""Generated from the enums: a state that does not say what it does, how it is left and how it is undone fails here."""

from collections.abc import Iterator
from datetime import timedelta
from itertools import product

import pytest
from records import EPOCH, migration

from handoff.controller.v1.migrations_pb2 import MigrationState
from handoff_controller.machine import (
    CANCELLABLE,
    FINAL,
    PHASES,
    Event,
    State,
    Step,
    enter,
    is_taken_back,
    next_state,
    state_of,
)

FORWARD = (
    State.PLANNED,
    State.PREPARING,
    State.COPYING,
    State.SWITCHING,
    State.COMMITTED,
    State.FINISHING,
    State.DONE,
)
BEFORE_COMMIT = FORWARD[: FORWARD.index(State.COMMITTED)]

# What may become of each state, written down once more by hand: (completed, failed, fenced).
EXPECTED: dict[State, tuple[State | None, State | None, State | None]] = {
    State.PLANNED: (State.PREPARING, State.ABORTED, None),
    State.PREPARING: (State.COPYING, State.ABORTING, None),
    State.COPYING: (State.SWITCHING, State.ABORTING, None),
    State.SWITCHING: (State.COMMITTED, State.ABORTING, None),
    State.COMMITTED: (State.FINISHING, None, State.ABORTING),
    State.FINISHING: (State.DONE, None, State.ABORTING),
    State.ABORTING: (State.ABORTED, None, None),
}
EVENTS = (Event.COMPLETED, Event.FAILED, Event.FENCED)


def ways(state: State) -> Iterator[State]:
    return (following for following in EXPECTED.get(state, ()) if following is not None)


def reachable(start: State, without: State | None = None) -> set[State]:
    seen, todo = set(), [start]
    while todo:
        state = todo.pop()
        if state in seen or state is without:
            continue
        seen.add(state)
        todo.extend(ways(state))
    return seen


def test_python_and_the_contract_name_the_same_states() -> None:
    named = {name.removeprefix("MIGRATION_STATE_"): number for name, number in MigrationState.items()}
    del named["UNSPECIFIED"]

    assert {state.name: state.value for state in State} == named


@pytest.mark.parametrize("state", State)
def test_every_state_is_final_or_has_work_to_resume(state: State) -> None:
    assert (state in FINAL) != (state in PHASES)
    if state in PHASES:
        assert PHASES[state].steps, "a new leader would not know what to do in it"


@pytest.mark.parametrize("state", [state for state in State if state not in FINAL])
def test_every_state_is_listed_with_how_it_is_left(state: State) -> None:
    assert state in EXPECTED, "say how it is cancelled, resumed and recovered"


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)))
def test_every_event_in_every_state(state: State, event: Event) -> None:
    expected = EXPECTED.get(state, (None, None, None))[EVENTS.index(event)]

    if state in FINAL:
        with pytest.raises(KeyError):
            next_state(state, event)
    elif expected is None:
        with pytest.raises(ValueError, match=state.name):
            next_state(state, event)
    else:
        assert next_state(state, event) is expected


@pytest.mark.parametrize("state", State)
def test_every_state_is_reachable_and_comes_to_an_end(state: State) -> None:
    assert state in reachable(State.PLANNED)
    assert reachable(state) & FINAL


def test_a_cancel_is_taken_exactly_before_the_commit() -> None:
    assert set(BEFORE_COMMIT) == CANCELLABLE


@pytest.mark.parametrize("state", BEFORE_COMMIT)
def test_before_the_commit_a_failure_leads_to_the_abort_without_passing_the_commit(state: State) -> None:
    failed = next_state(state, Event.FAILED)

    assert failed in (State.ABORTING, State.ABORTED)
    assert State.COMMITTED not in reachable(failed)


def test_done_is_reached_through_the_commit_only() -> None:
    assert State.DONE not in reachable(State.PLANNED, without=State.COMMITTED)


def test_after_the_commit_only_proof_leads_back() -> None:
    for state in (State.COMMITTED, State.FINISHING):
        assert [event for event in Event if EXPECTED[state][EVENTS.index(event)] is State.ABORTING] == [Event.FENCED]


def test_each_step_belongs_to_one_state() -> None:
    steps = [step for phase in PHASES.values() for step in phase.steps]

    assert sorted(steps) == sorted(set(Step) - {Step.REVOKE_VOLUMES})


def test_whichever_host_does_not_have_the_guest_loses_its_volumes_last() -> None:
    assert [state for state, phase in PHASES.items() if phase.then] == [State.FINISHING, State.ABORTING]
    assert {phase.then for phase in PHASES.values()} == {(), (Step.REVOKE_VOLUMES,)}


@pytest.mark.parametrize("step", Step)
def test_what_undoes_a_step_is_in_the_abort(step: Step) -> None:
    touches_source = step in (Step.PREPARE_SOURCE, Step.START_TRANSFER, Step.SWITCH_OVER)
    touches_destination = step in (Step.PREPARE_DESTINATION, Step.ACTIVATE)
    undone = PHASES[State.ABORTING].steps

    assert not touches_source or Step.ABORT_SOURCE in undone
    assert not touches_destination or Step.ABORT_DESTINATION in undone


@pytest.mark.parametrize("state", State)
def test_entering_a_state(state: State) -> None:
    before = migration(state=State.PLANNED)
    before.waiting_for = "another one"
    unchanged = before.SerializeToString(deterministic=True)

    after = enter(before, state, at=EPOCH + timedelta(seconds=2.5), term=7, reason="why")

    assert before.SerializeToString(deterministic=True) == unchanged
    assert state_of(after) is state
    (line,) = after.timeline
    assert (line.state, line.reason, line.term) == (state.value, "why", 7)
    assert after.waiting_for == ""
    assert after.HasField("end_time") == (state in FINAL)
    assert after.outcome.total_ms == (2500 if state in FINAL else 0)
    assert after.error == ("why" if state in (State.ABORTING, State.ABORTED) else "")


def test_the_first_reason_of_an_abort_stays() -> None:
    aborting = enter(migration(), State.ABORTING, at=EPOCH, term=1, reason="first")

    assert enter(aborting, State.ABORTED, at=EPOCH, term=1, reason="second").error == "first"


def test_a_guest_is_taken_back_only_by_an_abort_after_the_commit() -> None:
    undone = enter(migration(), State.ABORTING, at=EPOCH, term=1)
    committed = enter(migration(), State.COMMITTED, at=EPOCH, term=1)
    back = enter(committed, State.ABORTING, at=EPOCH, term=1)

    assert [is_taken_back(one) for one in (undone, committed, back)] == [False, False, True]


def test_clocks_that_ran_back_make_no_negative_total() -> None:
    assert enter(migration(created_s=10), State.DONE, at=EPOCH, term=1).outcome.total_ms == 0


def test_a_state_of_another_release_is_refused() -> None:
    unknown = migration()
    unknown.state = MigrationState.MIGRATION_STATE_UNSPECIFIED

    with pytest.raises(ValueError, match="0"):
        state_of(unknown)
