"""Every call in every state, checked against properties of the protocol rather than against the table itself."""

import itertools

import pytest

from handoff_agent.rules import (
    ABORTED,
    ACTIVE,
    DESTINATION,
    FAILED,
    FINAL_STATES,
    FINALIZED,
    HELD,
    PREPARED,
    READY,
    RELEASED,
    SOURCE,
    STATES,
    SWITCHING,
    TRANSFERRING,
    Answer,
    Call,
    judge,
    state_name,
)

SOURCE_PATH = (PREPARED, TRANSFERRING, READY, SWITCHING, HELD, RELEASED)
DESTINATION_PATH = (PREPARED, ACTIVE, FINALIZED)
SOURCE_CALLS = (Call.PREPARE, Call.START_TRANSFER, Call.SWITCH_OVER, Call.RELEASE, Call.ABORT)
DESTINATION_CALLS = (Call.PREPARE, Call.ACTIVATE, Call.FINALIZE, Call.ABORT, Call.EVICT)
# What each call leads to: from there on it has been carried out.
TARGETS = {
    SOURCE: {
        Call.PREPARE: PREPARED,
        Call.START_TRANSFER: TRANSFERRING,
        Call.SWITCH_OVER: SWITCHING,
        Call.RELEASE: RELEASED,
    },
    DESTINATION: {Call.PREPARE: PREPARED, Call.ACTIVATE: ACTIVE, Call.FINALIZE: FINALIZED},
}
PATHS = {SOURCE: SOURCE_PATH, DESTINATION: DESTINATION_PATH}
EVERY = [(call, role, state) for role in STATES for call, state in itertools.product(Call, (None, *STATES[role]))]


def ids(value):
    return value.value if isinstance(value, Call) else "new" if value is None else str(value)


@pytest.mark.parametrize(("call", "role", "state"), EVERY, ids=ids)
def test_each_refusal_says_why(call, role, state):
    verdict = judge(call, role, state)
    assert bool(verdict.message) == (verdict.answer is Answer.REFUSE)
    if verdict.message:
        assert verdict.message.startswith(call.value)


@pytest.mark.parametrize("role", STATES)
def test_a_repeated_call_answers_with_what_stands(role):
    path = PATHS[role]
    for call, target in TARGETS[role].items():
        for state in path[path.index(target) :]:
            assert judge(call, role, state).answer is Answer.ALREADY, (call, state_name(state))


@pytest.mark.parametrize("role", STATES)
def test_a_call_does_not_skip_a_step(role):
    path = PATHS[role]
    steps = [(call, path.index(target)) for call, target in TARGETS[role].items()]
    for (_, earlier), (call, _) in itertools.pairwise(steps):
        for state in (None, *path[:earlier]):
            assert judge(call, role, state).answer is Answer.REFUSE, (call, state and state_name(state))


@pytest.mark.parametrize("role", STATES)
def test_an_aborted_handoff_never_goes_on(role):
    undoing = (Call.ABORT, Call.EVICT) if role == DESTINATION else (Call.ABORT,)
    for call in Call:
        expected = Answer.ALREADY if call in undoing else Answer.REFUSE
        assert judge(call, role, ABORTED).answer is expected


def test_only_a_held_copy_is_destroyed():
    proceeding = [
        state for state in (None, *STATES[SOURCE]) if judge(Call.RELEASE, SOURCE, state).answer is Answer.PROCEED
    ]
    assert proceeding == [HELD]


def test_only_a_waiting_copy_is_run():
    proceeding = [
        state
        for state in (None, *STATES[DESTINATION])
        if judge(Call.ACTIVATE, DESTINATION, state).answer is Answer.PROCEED
    ]
    assert proceeding == [PREPARED]


@pytest.mark.parametrize("state", [ACTIVE, FINALIZED])
def test_a_guest_that_runs_is_not_aborted_away(state):
    verdict = judge(Call.ABORT, DESTINATION, state)
    assert verdict.answer is Answer.REFUSE
    assert state_name(state) in verdict.message


def test_a_fenced_hosts_copy_goes_even_if_it_ran():
    assert judge(Call.EVICT, DESTINATION, ACTIVE).answer is Answer.PROCEED
    assert judge(Call.EVICT, DESTINATION, FINALIZED).answer is Answer.REFUSE


def test_a_released_source_can_not_be_aborted():
    assert judge(Call.ABORT, SOURCE, RELEASED).answer is Answer.REFUSE


@pytest.mark.parametrize("role", STATES)
def test_everything_before_the_point_of_no_return_can_be_aborted(role):
    for state in (None, *STATES[role]):
        if state not in (ACTIVE, FINALIZED, RELEASED, ABORTED):
            assert judge(Call.ABORT, role, state).answer is Answer.PROCEED


@pytest.mark.parametrize("role", STATES)
def test_nothing_proceeds_from_a_final_state(role):
    for call, state in itertools.product(Call, FINAL_STATES & set(STATES[role])):
        assert judge(call, role, state).answer is not Answer.PROCEED


@pytest.mark.parametrize("role", STATES)
def test_a_failed_handoff_answers_forward_calls_with_itself(role):
    forward = {
        SOURCE: (Call.PREPARE, Call.START_TRANSFER, Call.SWITCH_OVER),
        DESTINATION: (Call.PREPARE, Call.ACTIVATE),
    }
    for call in forward[role]:
        assert judge(call, role, FAILED).answer is Answer.ALREADY


@pytest.mark.parametrize("call", [call for call in Call if call not in SOURCE_CALLS])
def test_calls_to_the_other_side_are_refused_at_the_source(call):
    assert all(judge(call, SOURCE, state).answer is Answer.REFUSE for state in (None, *STATES[SOURCE]))


@pytest.mark.parametrize("call", [call for call in Call if call not in DESTINATION_CALLS])
def test_calls_to_the_other_side_are_refused_at_the_destination(call):
    assert all(judge(call, DESTINATION, state).answer is Answer.REFUSE for state in (None, *STATES[DESTINATION]))
