import json
from itertools import product

import pytest
from records import domain, guest, migration, place

from handoff.controller.v1.guests_pb2 import Guest
from handoff.controller.v1.migrations_pb2 import Migration
from handoff_controller.etcd.txn import KeyValue
from handoff_controller.machine import FINAL, State
from handoff_controller.store import decode, encode, guest_after


def stored(value: bytes, revision: int = 42) -> KeyValue:
    return KeyValue("key", value, 1, revision, 1, 0)


def owner_after(state: State, before: str) -> str:
    """Before the commit nothing changes, the commit gives the guest away, the abort gives it back."""
    if state is State.COMMITTED:
        return "h2"
    return "h1" if state in (State.ABORTING, State.ABORTED) else before


@pytest.mark.parametrize(("state", "before"), list(product(State, ("h1", "h2"))))
def test_whom_a_guest_belongs_to_after_each_state(state: State, before: str) -> None:
    given = guest(before, active="m1")

    after = guest_after(given, migration(state=state))

    expected = owner_after(state, before)
    assert after.owner == place(expected)
    assert after.generation == (1 if expected == before else 2)
    assert after.active_migration == ("" if state in FINAL else "m1")
    assert given == guest(before, active="m1")


@pytest.mark.parametrize("state", [state for state in State if state in FINAL])
def test_a_guest_is_not_freed_from_another_migration(state: State) -> None:
    assert guest_after(guest(active="m2"), migration(state=state)).active_migration == "m2"


def test_a_record_survives_etcd() -> None:
    before = migration(state=State.COPYING)
    before.timeline.add(state=State.PLANNED.value, term=3).time.FromSeconds(1)
    before.warnings.append("odd")
    before.outcome.downtime_ms = 12.5

    after = decode(stored(encode(before)), Migration)

    assert after.revision == 42
    after.revision = 0
    assert after == before


def test_what_is_not_part_of_the_record_is_left_out() -> None:
    moving, moved = migration(), guest()
    moving.progress.elapsed_ms, moving.revision = 5, 7
    moved.domain.CopyFrom(domain())
    moved.revision = 7

    assert encode(moving) == encode(migration())
    assert encode(moved) == encode(guest())
    assert (moving.progress.elapsed_ms, moved.domain.name) == (5, "web")


def test_records_read_well() -> None:
    value = json.loads(encode(migration(state=State.SWITCHING)))

    assert value["guest_name"] == "web"
    assert value["state"] == "MIGRATION_STATE_SWITCHING"
    assert value["options"]["timeout"] == "1800s"


def test_fields_of_a_newer_release_are_left_out() -> None:
    value = json.loads(encode(guest()))
    value["colour"] = "green"

    assert decode(stored(json.dumps(value).encode(), 0), Guest) == guest()
