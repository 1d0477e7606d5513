"""What a rollout does next, for all that the records may say."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import EPOCH, domain, guest, migration

from handoff.agent.v1.types_pb2 import DomainState
from handoff.controller.v1.guests_pb2 import Guest
from handoff.controller.v1.migrations_pb2 import Migration
from handoff.controller.v1.rollouts_pb2 import Rollout, RolloutGuest
from handoff_controller.machine import State
from handoff_controller.rollout import FINAL, Decision, Look, Phase, Turn, decide, phase_of, refused, turn_of

AT = EPOCH + timedelta(minutes=1)


def rollout(count: int = 3, *, parallel: int = 1, keep_going: bool = False) -> Rollout:
    return Rollout(
        id="r1",
        host="h1",
        release="new",
        parallel=parallel,
        keep_going=keep_going,
        state=Phase.RUNNING.value,
        guests=[RolloutGuest(uuid=f"u{n}", name=f"g{n}", state=Turn.PENDING.value) for n in range(1, count + 1)],
    )


def record(number: int, *, owner: str = "h1", active: str = "", build: str = "old") -> Guest:
    made = guest(owner, uuid=f"u{number}", name=f"g{number}", active=active)
    made.domain.CopyFrom(domain(made.uuid, made.name))
    made.domain.emulator_name = build
    return made


def upgrade(number: int, state: State, error: str = "") -> Migration:
    made = migration(f"r1-g{number}", "h1", "h1", state, uuid=f"u{number}", name=f"g{number}")
    made.error = error
    return made


def look(*upgrades: Migration, guests: tuple[Guest, ...] | None = None) -> Look:
    known = tuple(record(n) for n in range(1, 10)) if guests is None else guests
    return Look({one.id: one for one in upgrades}, {one.uuid: one for one in known})


def turns(found: Rollout) -> list[Turn]:
    return [turn_of(one) for one in found.guests]


def after(found: Rollout, *upgrades: Migration, guests: tuple[Guest, ...] | None = None) -> Decision:
    return decide(found, look(*upgrades, guests=guests), at=AT)


def test_one_after_the_other() -> None:
    first = after(rollout())
    assert turns(first.rollout) == [Turn.UPGRADING, Turn.PENDING, Turn.PENDING]
    assert first.create == ("r1-g1",)
    waiting = upgrade(1, State.PLANNED)
    waiting.waiting_for = "its turn"
    second = after(first.rollout, waiting)
    assert second.create == ()
    assert second.rollout.guests[0].reason == "its turn"
    third = after(second.rollout, upgrade(1, State.DONE))
    assert turns(third.rollout) == [Turn.UPGRADED, Turn.UPGRADING, Turn.PENDING]
    assert third.create == ("r1-g2",)
    fourth = after(third.rollout, upgrade(2, State.DONE))
    last = after(fourth.rollout, upgrade(3, State.DONE))
    assert phase_of(last.rollout) is Phase.DONE
    assert last.rollout.end_time.ToDatetime(tzinfo=AT.tzinfo) == AT
    assert after(last.rollout).rollout == last.rollout


def test_a_guest_that_was_just_started_is_not_taken_for_gone() -> None:
    seen = Look({}, {}, frozenset({"u1"}))
    waits = decide(rollout(1), seen, at=AT).rollout
    assert turns(waits) == [Turn.PENDING]
    assert "records" in waits.guests[0].reason
    assert turns(after(waits).rollout) == [Turn.UPGRADING]
    assert turns(decide(waits, Look({}, {}), at=AT).rollout) == [Turn.SKIPPED]


def test_several_at_a_time() -> None:
    first = after(rollout(4, parallel=2))
    assert first.create == ("r1-g1", "r1-g2")
    second = after(first.rollout, upgrade(1, State.COPYING), upgrade(2, State.DONE))
    assert second.create == ("r1-g3",)
    assert turns(second.rollout) == [Turn.UPGRADING, Turn.UPGRADED, Turn.UPGRADING, Turn.PENDING]


def test_a_new_leader_creates_what_was_recorded_and_is_not_there() -> None:
    recorded = after(rollout()).rollout
    assert after(recorded) == Decision(recorded, ("r1-g1",))


def test_the_first_failure_stops_it_and_what_is_under_way_is_finished() -> None:
    first = after(rollout(4, parallel=2))
    second = after(first.rollout, upgrade(1, State.ABORTED, "QEMU crashed"), upgrade(2, State.COPYING))
    assert phase_of(second.rollout) is Phase.STOPPING
    assert second.rollout.reason == "g1 failed: QEMU crashed"
    assert second.create == ()
    third = after(second.rollout, upgrade(2, State.DONE))
    assert phase_of(third.rollout) is Phase.FAILED
    assert turns(third.rollout) == [Turn.FAILED, Turn.UPGRADED, Turn.PENDING, Turn.PENDING]
    assert third.rollout.reason == "g1 failed: QEMU crashed"


def test_it_goes_on_when_told_so() -> None:
    found = after(rollout(2, keep_going=True)).rollout
    found = after(found, upgrade(1, State.ABORTED, "QEMU crashed")).rollout
    assert turns(found) == [Turn.FAILED, Turn.UPGRADING]
    found = after(found, upgrade(2, State.DONE)).rollout
    assert (phase_of(found), found.reason) == (Phase.FAILED, "1 of 2 guests failed")


def test_a_cancel_begins_no_more() -> None:
    found = after(rollout()).rollout
    found.cancel_requested = True
    stopping = after(found, upgrade(1, State.COPYING))
    assert phase_of(stopping.rollout) is Phase.STOPPING
    ended = after(stopping.rollout, upgrade(1, State.DONE)).rollout
    assert (phase_of(ended), ended.reason) == (Phase.CANCELLED, "cancelled by the operator")
    assert turns(ended) == [Turn.UPGRADED, Turn.PENDING, Turn.PENDING]


def test_a_cancel_takes_back_what_was_not_created() -> None:
    found = after(rollout()).rollout
    found.cancel_requested = True
    ended = after(found).rollout
    assert phase_of(ended) is Phase.CANCELLED
    assert turns(ended) == [Turn.PENDING] * 3
    assert ended.guests[0].migration_id == ""


def test_a_cancel_that_comes_with_the_last_guest_changes_nothing() -> None:
    found = after(rollout(1)).rollout
    found.cancel_requested = True
    assert phase_of(after(found, upgrade(1, State.DONE)).rollout) is Phase.DONE


@pytest.mark.parametrize(
    ("here", "reason"),
    [
        (record(1, build="new"), "runs under new already"),
        (record(1, owner="h2"), "not on h1 any more: now on h2"),
        (None, "not on h1 any more: gone"),
    ],
)
def test_nothing_to_do(here: Guest | None, reason: str) -> None:
    found = after(rollout(1), guests=() if here is None else (here,)).rollout
    assert (turns(found), found.guests[0].reason) == ([Turn.SKIPPED], reason)
    assert phase_of(found) is Phase.DONE


def test_a_guest_that_is_off_is_passed_over() -> None:
    off = record(1)
    off.domain.state = DomainState.DOMAIN_STATE_SHUT_OFF
    assert after(rollout(1), guests=(off,)).rollout.guests[0].reason == "not running"


def test_a_guest_that_is_being_moved_comes_later() -> None:
    found = after(rollout(2), guests=(record(1, active="m7"), record(2)))
    assert turns(found.rollout) == [Turn.PENDING, Turn.UPGRADING]
    assert found.rollout.guests[0].reason == "waits for migration m7, which has it now"
    found = after(found.rollout, upgrade(2, State.DONE))
    assert turns(found.rollout) == [Turn.UPGRADING, Turn.UPGRADED]


def test_a_refused_upgrade() -> None:
    found = after(rollout(2)).rollout
    again = refused(found, "r1-g1", Turn.UPGRADING, "host down")
    assert (turns(again)[0], again.guests[0].reason) == (Turn.UPGRADING, "host down")
    failed = after(refused(found, "r1-g1", Turn.FAILED, "a host device")).rollout
    assert (phase_of(failed), failed.reason) == (Phase.FAILED, "g1 failed: a host device")


@given(data=st.data(), parallel=st.integers(1, 3), keep_going=st.booleans())
def test_whatever_happens_it_ends_and_never_does_too_much(data: st.DataObject, parallel: int, keep_going: bool) -> None:
    """Upgrades succeed, fail or are refused, leaders change (the record is all that is left): it ends, in bounds."""
    found = rollout(4, parallel=parallel, keep_going=keep_going)
    states: dict[str, State] = {}
    for _ in range(40):
        decision = decide(found, look(*(upgrade(int(i[-1]), s, "broken") for i, s in states.items())), at=AT)
        found = Rollout.FromString(decision.rollout.SerializeToString())
        under_way = [one for one in found.guests if turn_of(one) is Turn.UPGRADING]
        assert len(under_way) <= parallel
        if phase_of(found) in FINAL:
            break
        failed = any(turn_of(one) is Turn.FAILED for one in found.guests)
        assert not decision.create or keep_going or not failed
        for one in decision.create:
            match data.draw(st.sampled_from(["created", "lost", "refused"])):
                case "created":
                    states[one] = State.PLANNED
                case "refused":
                    found = refused(found, one, Turn.FAILED, "refused")
        for one, state in states.items():
            if state is State.PLANNED:
                states[one] = data.draw(st.sampled_from([State.PLANNED, State.DONE, State.DONE, State.ABORTED]))
        if data.draw(st.integers(0, 20)) == 0:
            found.cancel_requested = True
    else:
        assert set(turns(found)) & {Turn.UPGRADING, Turn.PENDING}
        return
    assert Turn.UPGRADING not in turns(found)
    if phase_of(found) is Phase.DONE:
        assert set(turns(found)) <= {Turn.UPGRADED, Turn.SKIPPED}
