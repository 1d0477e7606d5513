"""The invariants of docs/design.md, under message loss, duplication, delay, leader change and the death of parts."""

import logging
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import structlog
from hypothesis import HealthCheck, Phase, example, find, given, settings
from hypothesis import strategies as st
from mutants import LATE_REVOKE, MUTANTS
from plans import Kind, Operator, Plan, Trouble
from world import play

from handoff_controller.machine import State

# A run without trouble sends 19 messages, a fast migration 21; the commit is number 12.
LAST_MESSAGE = 40
SWITCH = (7, 15)
PULL = (13, 21)
NEEDS_NO_DECISION_S = 10.0
DELAYS_S = (0.0, 0.001, 0.01, 0.3, 3.0, 12.0, 40.0)
LIKELY = (Kind.LATE, Kind.ANSWER_LOST, Kind.NEW_LEADER, Kind.CANCEL)

MESSAGES = st.integers(0, LAST_MESSAGE) | st.integers(*SWITCH)
KINDS = st.sampled_from(Kind) | st.sampled_from(LIKELY)
TROUBLES = st.builds(Trouble, MESSAGES, KINDS, st.sampled_from(DELAYS_S[:-2]), st.sampled_from(DELAYS_S))
PLANS = st.builds(
    Plan,
    st.lists(TROUBLES, max_size=5).map(tuple),
    st.sampled_from((0.2, 1.0, 10.0)),
    st.sampled_from((1800, 9, 1)),
    st.sampled_from((1, 2)),
    st.builds(Operator, st.sampled_from((5.0, 0.1, 60.0)), st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from((0.0, 0.1, 5.0)),
)


def one(at: int, kind: Kind, after_s: float = 0.0, delay_s: float = 0.0) -> Trouble:
    return Trouble(at, kind, after_s, delay_s)


GIVEN_UP_AFTER_THE_FENCE = Plan(
    (one(15, Kind.DESTINATION_OFF, 0.003, 40.0), one(36, Kind.SOURCE_OFF, 0.003, 100.0)),
    operator=Operator(after_s=0.1),
    pull_s=30.0,
)


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


def test_without_trouble_the_guest_moves_there_and_back() -> None:
    there = play(Plan())
    back = play(Plan(rounds=2))

    assert (there.violations, there.state) == ((), State.DONE)
    assert (back.violations, back.state, back.messages) == ((), State.DONE, 2 * there.messages)


OPERATORS = (Operator(), Operator(to_source=False), Operator(by_hand=True), Operator(by_hand=True, only_cuts=True))


@pytest.mark.parametrize("kind", Kind)
def test_one_trouble_at_each_message(kind: Kind) -> None:
    for at in range(20):
        for after_s, delay_s in ((0.0, 3.0), (0.003, 40.0)):
            deciders = OPERATORS if at in range(*SWITCH) and delay_s > NEEDS_NO_DECISION_S else OPERATORS[:1]
            for operator in deciders:
                plan = Plan((one(at, kind, after_s, delay_s),), operator=operator)

                verdict = play(plan)

                assert not verdict.violations, (plan, verdict)


FAST_OPERATORS = (Operator(), Operator(to_source=False), Operator(after_s=0.1, by_hand=True))


@pytest.mark.parametrize("kind", Kind)
def test_one_trouble_at_each_message_of_a_pull(kind: Kind) -> None:
    for at in range(*PULL):
        for after_s, delay_s, pull_s in ((0.0, 3.0, 0.1), (0.003, 40.0, 5.0)):
            for operator in FAST_OPERATORS if delay_s > NEEDS_NO_DECISION_S else FAST_OPERATORS[:1]:
                plan = Plan((one(at, kind, after_s, delay_s),), operator=operator, pull_s=pull_s)

                verdict = play(plan)

                assert not verdict.violations, (plan, verdict)


SILENT = one(15, Kind.DESTINATION_CUT, 0.003, 40.0)


@pytest.mark.parametrize(
    ("operator", "trouble", "state"),
    [
        (Operator(), SILENT, State.ABORTED),
        (Operator(by_hand=True), SILENT, State.ABORTED),
        (Operator(to_source=False), SILENT, State.DONE),
        (Operator(), one(15, Kind.DESTINATION_OFF, 0.003, 40.0), State.ABORTED),
        (Operator(to_source=False), one(15, Kind.SOURCE_OFF, 0.003, 40.0), State.DONE),
    ],
)
def test_what_is_decided_in_a_pull_is_done(operator: Operator, trouble: Trouble, state: State) -> None:
    verdict = play(Plan((trouble,), operator=operator, pull_s=60.0))

    assert (verdict.violations, verdict.state) == ((), state)


@given(plan=PLANS)
@example(plan=LATE_REVOKE).via("it comes as the guest is on its way back")
@example(plan=GIVEN_UP_AFTER_THE_FENCE).via("the source is given up as well, then the destination is back")
@example(plan=Plan((one(13, Kind.DESTINATION_DIES), one(15, Kind.LOST)))).via("fence proven, then the leader changed")
@settings(max_examples=600, deadline=None, derandomize=True, database=None)
def test_the_invariants_hold_and_all_ends_well(plan: Plan) -> None:
    verdict = play(plan)

    assert not verdict.violations, verdict


@pytest.mark.parametrize("name", MUTANTS)
def test_the_model_finds(name: str) -> None:
    mutant, hint = MUTANTS[name]
    search = settings(
        max_examples=400,
        phases=(Phase.generate,),
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    plans = PLANS.map(lambda plan: replace(hint, troubles=hint.troubles + plan.troubles, operator=plan.operator))

    plan = find(plans, lambda plan: bool(play(plan, mutant).violations), settings=search, random=random.Random(1))

    assert not play(plan).violations
