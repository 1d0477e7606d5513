import dataclasses
import json

import pytest

from handoff.agent.v1 import types_pb2
from handoff_agent.ledger import TOMBSTONE_LIFE_S, Ledger, Record, TermGuard
from handoff_agent.rules import DESTINATION, HELD, PREPARED, RELEASED, SOURCE
from handoff_common.errors import StaleTermError

NOW_S = 1_800_000_000.0


def record(**changes):
    values = Record(
        migration_id="m1", role=SOURCE, state=HELD, domain_uuid="u", domain_name="g", slot="a", changed_s=NOW_S
    )
    return dataclasses.replace(values, **changes)


def test_what_was_saved_is_found_again(tmp_path):
    saved = record(was_running=True, autostart=True, paused_s=1.5, persistent_xml="<domain>ä</domain>")
    Ledger(tmp_path).save(saved)
    assert Ledger(tmp_path).load(NOW_S) == [saved]


def test_both_roles_of_one_migration_are_kept(tmp_path):
    ledger = Ledger(tmp_path)
    both = [record(role=DESTINATION, state=PREPARED), record()]
    for each in both:
        ledger.save(each)
    assert ledger.load(NOW_S) == both


def test_the_last_state_counts(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.save(record())
    ledger.save(record(state=RELEASED))
    assert [each.state for each in ledger.load(NOW_S)] == [RELEASED]


def test_a_handoff_never_begun_is_forgotten(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.save(record())
    ledger.remove(record())
    ledger.remove(record())
    assert ledger.load(NOW_S) == []


def test_finished_handoffs_are_forgotten_after_a_week_and_others_never(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.save(record(migration_id="old", state=RELEASED, changed_s=NOW_S - TOMBSTONE_LIFE_S - 1))
    ledger.save(record(migration_id="recent", state=RELEASED, changed_s=NOW_S - TOMBSTONE_LIFE_S + 1))
    ledger.save(record(migration_id="held", state=HELD, changed_s=NOW_S - 10 * TOMBSTONE_LIFE_S))
    assert [each.migration_id for each in ledger.load(NOW_S)] == ["held", "recent"]
    assert [each.migration_id for each in ledger.load(NOW_S)] == ["held", "recent"]


def test_an_unreadable_record_is_set_aside_and_the_others_are_read(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.save(record())
    broken = tmp_path / "handoffs" / "m0.source.json"
    broken.write_text("{")
    assert ledger.load(NOW_S) == [record()]
    assert broken.with_suffix(".unreadable").read_text() == "{"


def test_a_write_that_was_cut_short_leaves_the_record_as_it_was(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.save(record())
    (tmp_path / "handoffs" / "m1.source.new").write_text("{")
    assert ledger.load(NOW_S) == [record()]


def test_fields_of_a_newer_release_are_ignored(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.save(record())
    path = tmp_path / "handoffs" / "m1.source.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"from_the_future": 1}))
    assert ledger.load(NOW_S) == [record()]


def fence(term, leader="c1"):
    return types_pb2.Fence(term=term, leader=leader)


def test_a_lower_term_is_refused_and_both_are_named(tmp_path):
    guard = TermGuard(tmp_path)
    guard.admit(fence(7, "c2"))
    with pytest.raises(StaleTermError, match=r"term 5 of controller c1.*term 7 of controller c2"):
        guard.admit(fence(5, "c1"))
    assert guard.term == 7


def test_the_same_term_passes_again(tmp_path):
    guard = TermGuard(tmp_path)
    guard.admit(fence(7))
    guard.admit(fence(7))


def test_the_term_outlives_the_agent(tmp_path):
    TermGuard(tmp_path).admit(fence(7, "c2"))
    revived = TermGuard(tmp_path)
    assert revived.term == 7
    with pytest.raises(StaleTermError):
        revived.admit(fence(6))
