"""The invariants of docs/design.md, under message loss, duplication, delay, leader change and the death of parts."""

import logging
import random
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, Phase, example, find, given, settings
from hypothesis import strategies as st
from mutants import MUTANTS
from world import Kind, Operator, Plan, Trouble, play

from handoff_controller.machine import State

# A run without trouble sends 17 messages; the commit is number 11.
LAST_MESSAGE = 40
SWITCH = (6, 14)
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
)


def one(at: int, kind: Kind, after_s: float = 0.0, delay_s: float = 0.0) -> Trouble:
    return Trouble(at, kind, after_s, delay_s)


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
    for at in range(18):
        for after_s, delay_s in ((0.0, 3.0), (0.003, 40.0)):
            for operator in OPERATORS if at in range(*SWITCH) else OPERATORS[:1]:
                plan = Plan((one(at, kind, after_s, delay_s),), operator=operator)

                verdict = play(plan)

                assert not verdict.violations, (plan, verdict)


@given(plan=PLANS)
@example(plan=Plan((one(12, Kind.DESTINATION_DIES), one(14, Kind.LOST)))).via("fence proven, then the leader changed")
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
    plans = st.builds(
        lambda plan, hints: Plan(hints + plan.troubles, plan.copy_s, operator=plan.operator), PLANS, st.just(hint)
    )

    plan = find(plans, lambda plan: bool(play(plan, mutant).violations), settings=search, random=random.Random(1))

    assert not play(plan).violations
