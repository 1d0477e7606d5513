import pytest
from records import UUID, domain, guest, place

from handoff.agent.v1.types_pb2 import Domain, DomainState
from handoff.controller.v1.guests_pb2 import Guest
from handoff.controller.v1.migrations_pb2 import GuestLoss
from handoff_controller.reconcile import ACTIVE, reconcile

SHUT_OFF = DomainState.DOMAIN_STATE_SHUT_OFF
BOTH = {"h1": {UUID}, "h2": {UUID}}


def test_a_new_guest_is_written_down() -> None:
    changes = reconcile("h1", [domain(slot="b")], [], {"h1": {UUID}})

    (written,) = changes.written
    assert (written.uuid, written.name, written.owner, written.generation) == (UUID, "web", place("h1", "b"), 1)


def test_a_copy_of_a_handoff_is_no_new_guest() -> None:
    assert reconcile("h2", [domain(migration_id="m1")], [], {"h2": {UUID}}).written == ()


def test_what_is_as_recorded_is_not_written() -> None:
    changes = reconcile("h1", [domain()], [guest()], {"h1": {UUID}})

    assert (changes.written, changes.forgotten) == ((), ())


def test_name_and_slot_follow_the_owner() -> None:
    changes = reconcile("h1", [domain(name="www", slot="b")], [guest()], {"h1": {UUID}})

    (written,) = changes.written
    assert (written.name, written.owner.slot, written.generation) == ("www", "b", 1)


@pytest.mark.parametrize("host", ["h1", "h2"])
def test_a_guest_in_a_migration_is_left_alone(host: str) -> None:
    changes = reconcile(host, [], [guest(active="m1")], {"h1": set(), "h2": set()})

    assert (changes.written, changes.forgotten) == ((), ())


def test_a_guest_that_is_gone_is_forgotten() -> None:
    assert reconcile("h1", [], [guest()], {"h1": set()}).forgotten == (guest(),)


def test_a_guest_that_another_host_has_is_not_forgotten() -> None:
    changes = reconcile("h1", [], [guest()], {"h1": set(), "h2": {UUID}})

    assert (changes.written, changes.forgotten) == ((), ())


@pytest.mark.parametrize("state", sorted(ACTIVE))
def test_a_guest_moved_by_hand_goes_to_the_host_that_has_it(state: "DomainState.ValueType") -> None:
    changes = reconcile("h2", [domain(state=state)], [guest()], {"h1": set(), "h2": {UUID}})

    (written,) = changes.written
    assert (written.owner, written.generation) == (place("h2"), 2)
    assert list(written.conflicts) == []


def test_an_owner_that_does_not_answer_keeps_its_guest() -> None:
    changes = reconcile("h2", [domain()], [guest()], {"h2": {UUID}})

    (written,) = changes.written
    assert (written.owner, list(written.conflicts)) == (place("h1"), ["h2"])


def test_two_slots_that_have_it_are_a_conflict_until_one_is_gone() -> None:
    both = [domain(), domain(slot="b")]
    (conflict,) = reconcile("h1", both, [guest()], {"h1": {UUID}}).written
    assert (conflict.owner, list(conflict.conflicts)) == (place("h1", "a"), ["h1/b"])
    assert reconcile("h1", both, [conflict], {"h1": {UUID}}).written == ()
    (settled,) = reconcile("h1", [domain()], [conflict], {"h1": {UUID}}).written
    assert list(settled.conflicts) == []


@pytest.mark.parametrize("leftover", [domain(slot="b", migration_id="m1"), domain(slot="b", state=SHUT_OFF)])
def test_what_is_left_of_an_upgrade_is_no_conflict(leftover: "Domain") -> None:
    assert reconcile("h1", [domain(), leftover], [guest()], {"h1": {UUID}}).written == ()


def test_two_that_have_it_are_a_conflict_until_one_is_gone() -> None:
    (conflict,) = reconcile("h2", [domain()], [guest()], BOTH).written
    assert list(conflict.conflicts) == ["h2"]
    assert reconcile("h2", [domain()], [conflict], BOTH).written == ()

    (mended,) = reconcile("h2", [], [conflict], {"h1": {UUID}, "h2": set()}).written
    assert list(mended.conflicts) == []


def test_a_definition_elsewhere_is_no_conflict() -> None:
    shut_off = domain(state=DomainState.DOMAIN_STATE_SHUT_OFF)

    assert reconcile("h2", [shut_off], [guest()], BOTH).written == ()


def test_a_copy_of_an_ended_handoff_is_no_conflict() -> None:
    assert reconcile("h2", [domain(migration_id="m1")], [guest()], BOTH).written == ()


def test_the_given_records_are_not_changed() -> None:
    given = guest()

    reconcile("h2", [domain()], [given], BOTH)

    assert given == guest()


@pytest.mark.parametrize("slots", ["ab", "ba"])
def test_of_a_guest_in_both_slots_the_running_copy_counts(slots: str) -> None:
    state = {"a": DomainState.DOMAIN_STATE_PAUSED, "b": DomainState.DOMAIN_STATE_RUNNING}
    both = [domain(slot=slot, state=state[slot], migration_id="m1") for slot in slots]

    (written,) = reconcile("h1", both, [guest()], {"h1": {UUID}}).written
    assert written.owner == place("h1", "b")


@pytest.mark.parametrize("slots", ["ab", "ba"])
def test_of_a_guest_that_runs_in_neither_slot_the_recorded_one_counts(slots: str) -> None:
    both = [domain(slot=slot, state=DomainState.DOMAIN_STATE_SHUT_OFF) for slot in slots]

    assert reconcile("h1", both, [guest()], {"h1": {UUID}}).written == ()


def lost(owner: str = "h1", *, certain: bool = False) -> Guest:
    found = guest(owner)
    found.loss.CopyFrom(GuestLoss(host=owner, reason="h1 did not answer", certain=certain))
    return found


def test_a_lost_guest_that_runs_is_not_lost() -> None:
    changes = reconcile("h1", [domain()], [lost()], {"h1": {UUID}})

    assert changes.written == (guest(),)


@pytest.mark.parametrize("seen", [[domain(state=DomainState.DOMAIN_STATE_SHUT_OFF)], []], ids=["off", "gone"])
def test_a_guest_that_may_be_lost_is_for_certain_once_its_host_is_back_without_it(seen: list[Domain]) -> None:
    changes = reconcile("h1", seen, [lost()], {"h1": {one.uuid for one in seen}})

    assert changes.forgotten == ()
    assert changes.written[0].loss.certain
    assert changes.written[0].loss.reason.endswith("before, h1 did not answer")
    assert reconcile("h1", seen, changes.written, {"h1": set()}).written == ()


def test_a_lost_guest_that_runs_elsewhere_belongs_there() -> None:
    changes = reconcile("h2", [domain()], [lost(certain=True)], {"h1": set(), "h2": {UUID}})

    assert changes.written[0].owner == place("h2")
    assert not changes.written[0].HasField("loss")
