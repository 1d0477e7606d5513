"""What people see, from messages alone."""

import io
from datetime import datetime, timedelta

import pytest
from cli_samples import (
    ABORTED,
    COPYING,
    GIB,
    PLANNED,
    PREPARING,
    START,
    SWITCHING,
    UNDONE,
    WHOLE_WAY,
    a_guest,
    a_host,
    a_migration,
    a_rollout,
    copying,
)
from rich.console import Console, RenderableType

from handoff.controller.v1.hosts_pb2 import Host, HostState
from handoff.controller.v1.migrations_pb2 import (
    GuestLoss,
    Migration,
    MigrationState,
    Placement,
    Recovery,
    RecoveryTarget,
)
from handoff.controller.v1.rollouts_pb2 import RolloutState
from handoff_cli.follow import LinesView
from handoff_cli.render.fleet import guests_table, hosts_table
from handoff_cli.render.migrations import (
    aborted_sentence,
    cancel_sentence,
    done_sentence,
    lost_sentence,
    migrations_table,
    started_sentence,
)
from handoff_cli.render.progress import live_view
from handoff_cli.render.record import record
from handoff_cli.render.rollouts import end_sentence, live_rollout, rollout_record, rollouts_table

NOW = START + timedelta(seconds=90)


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


def text(renderable: RenderableType, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, markup=False, highlight=False, emoji=False).print(renderable)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def test_the_record_has_every_state_with_how_long_it_lasted() -> None:
    shown = text(record(a_migration(), NOW))
    lines = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line}
    assert lines["PLANNED"] == ["09:26:53.589", "12", "ms"]
    assert lines["COPYING"] == ["09:26:55.479", "12.3", "s"]
    assert lines["DONE"] == ["09:27:09.201"]


def test_the_record_splits_the_pause_and_names_qemus_own_figure() -> None:
    shown = text(record(a_migration(), NOW))
    for part in (
        "Guest pause            84 ms",
        "paused → held        59 ms (QEMU's own downtime 55 ms)",
        "held → committed     9.1 ms",
        "committed → running  16 ms",
        "1.40 GiB in 4 passes",
        "Total                  15.6 s",
    ):
        assert part in shown


def test_the_record_of_one_under_way_says_so_far_and_has_the_last_reading() -> None:
    shown = text(record(copying(0.4), NOW), 120)
    assert "So far     1 min 30 s" in shown
    assert "410 MiB sent, 614 MiB left, 112 MiB/s, pass 2, guest dirties 21.0 MiB/s" in shown.replace("\n", " ")
    assert "throttle to 20 %" in shown


def a_loss(*, certain: bool = True) -> GuestLoss:
    loss = GuestLoss(host="h2", reason="web-1 ran on h2, and its QEMU ended there", certain=certain)
    loss.time.FromDatetime(START)
    return loss


def test_a_guest_that_ended_at_its_destination_is_called_lost_and_not_undone() -> None:
    shown = text(record(a_migration(loss=a_loss()), NOW), 200)
    assert "DONE, guest lost" in shown
    assert "lost: web-1 ran on h2, and its QEMU ended there (noticed 2026-03-14" in shown
    assert "undone" not in shown
    assert "web-1 is lost: web-1 ran on h2" in lost_sentence(a_migration(loss=a_loss()))
    assert "web-1 may be lost" in lost_sentence(a_migration(loss=a_loss(certain=False)))


def test_a_decision_is_asked_for_wherever_one_looks() -> None:
    waiting = a_migration(WHOLE_WAY[:5], needs_decision="turn h2 off")
    for shown in (record(waiting, NOW), migrations_table([waiting], NOW), live_view(waiting, NOW)):
        assert "COMMITTED, needs a decision" in text(shown, 200)
    assert "needs a decision: turn h2 off" in text(record(waiting, NOW))
    assert "needs a decision: turn h2 off" in text(live_view(waiting, NOW))
    assert "web-1: needs a decision: turn h2 off" in text(guests_table([a_guest(needs_decision="turn h2 off")]), 200)


def test_a_decision_that_was_taken_is_shown_with_who_took_it() -> None:
    taken = Recovery(target=RecoveryTarget.RECOVERY_TARGET_SOURCE, by="alice@adm1", how="h2 is fenced")
    taken.time.FromDatetime(START)
    shown = text(record(a_migration(UNDONE, recovery=taken), NOW), 200)
    assert "for the source by alice@adm1, 2026-03-14" in shown
    assert "h2 is fenced" in shown


def test_lost_guests_and_where() -> None:
    lost, silent = a_guest(loss=a_loss()), a_guest("db-1", loss=a_loss(certain=False))
    shown = text(guests_table([lost, silent]), 200)
    assert "web-1 is lost on h2 since 2026-03-14" in shown
    assert "db-1 is unreachable on h2" in shown
    assert "running" not in shown


def test_what_is_to_be_decided_on_a_host() -> None:
    shown = text(hosts_table([a_host(problems=["web-1 is the source of a migration without a record"])], 120, NOW), 200)
    assert "h1: decide: web-1 is the source" in shown


def test_the_record_has_reasons_error_and_warnings() -> None:
    shown = text(record(a_migration(UNDONE, warnings=["the copy on h2 has not been removed"]), NOW))
    assert "cancelled by the operator while COPYING" in shown
    assert "undone because: cancelled by the operator" in shown
    assert "warning: the copy on h2 has not been removed" in shown


def test_the_record_of_one_that_waits() -> None:
    waiting = a_migration((PLANNED,), waiting_for="another migration from h1 to h2")
    assert "Waits for  another migration from h1 to h2" in text(record(waiting, NOW))


def test_a_failed_record_with_no_pause_shows_no_pause() -> None:
    assert "pause" not in text(record(a_migration(UNDONE), NOW))


@pytest.mark.parametrize("state", MigrationState.values())
def test_every_state_can_be_shown_everywhere(state: "MigrationState.ValueType") -> None:
    migration = a_migration((PLANNED, state))
    for renderable in (record(migration, NOW), migrations_table([migration], NOW), live_view(migration, NOW)):
        text(renderable)


def test_a_state_of_a_newer_controller_is_shown_by_its_number() -> None:
    newer = a_migration()
    newer.state = 42  # type: ignore[assignment]
    assert text(migrations_table([newer], NOW)).splitlines()[1].endswith("42")


def test_an_empty_message_can_be_shown() -> None:
    for renderable in (
        record(Migration(), NOW),
        migrations_table([Migration()], NOW),
        live_view(Migration(), NOW),
        hosts_table([Host()], 80, NOW),
        guests_table([a_guest(domain=None)]),
    ):
        text(renderable)


def test_the_table_of_migrations_fits_80_columns_one_line_each() -> None:
    listed = [
        a_migration(warnings=["release on h1 has not been done"]),
        a_migration(UNDONE),
        copying(0.3),
    ]
    lines = text(migrations_table(listed, NOW)).splitlines()
    assert len(lines) == 1 + len(listed)
    assert lines[1].split()[-2:] == ["DONE,", "warnings"]
    assert "84 ms" in lines[1]
    assert lines[2].endswith("ABORTED")
    assert lines[3].endswith("COPYING")


def test_a_cancel_that_is_not_yet_done_is_marked() -> None:
    cancelled = a_migration((PLANNED, PREPARING, COPYING), cancel_requested=True)
    assert text(migrations_table([cancelled], NOW), 120).endswith("COPYING, cancelled")


def test_an_id_is_never_cut_however_narrow_it_gets() -> None:
    shown = text(migrations_table([a_migration(guest_name="a-rather-long-name-of-a-guest-in-finance")], NOW), 60)
    assert "20260314-092653-5d3a" in shown


def test_a_local_upgrade_names_the_slots() -> None:
    upgrade = a_migration(destination=Placement(host="h1", slot="b"))
    assert "h1/a → h1/b" in text(migrations_table([upgrade], NOW))


def test_hosts_at_80_columns() -> None:
    hosts = [
        a_host(),
        a_host("h2", HostState.HOST_STATE_DOWN, message="agent does not answer: connection refused"),
        Host(name="h3", agent_address="h3:7701", message="not looked at yet"),
    ]
    lines = text(hosts_table(hosts, 80, NOW)).splitlines()
    assert lines[1].split()[:8] == ["h1", "UP", "3", "23.0", "of", "64.0", "GiB", "32"]
    assert lines[1].split()[-1] == "9.0.0"
    (unknown,) = [line for line in lines if line.startswith("h3 ") and "is" not in line]
    assert unknown.split() == ["h3", "UNKNOWN", "0", "–", "–", "–", "–"]
    assert "debian (7.2.22), current (10.0.2)" in text(hosts_table(hosts, 140, NOW), 140)
    assert "h2 is DOWN: agent does not answer: connection refused (last heard of 1 min ago)" in " ".join(lines)
    assert "h3 is UNKNOWN: not looked at yet" in lines


def test_hosts_in_a_wide_terminal_have_a_bar_and_an_address() -> None:
    line = text(hosts_table([a_host()], 140, NOW), 140).splitlines()[1]
    assert "██████░░░░  64 % used" in line
    assert line.endswith("h1.example.net:7701")


def test_guests() -> None:
    guests = [
        a_guest(),
        a_guest("db-2", "h2", active_migration="20260314-092653-5d3a"),
        a_guest("[bold]", "h3", conflicts=["h1"]),
    ]
    shown = text(guests_table(guests))
    lines = shown.splitlines()
    assert lines[1].split() == ["web-1", "h1/a", "running", "4.00", "GiB", "2", "10.0.2", "–"]
    assert lines[2].endswith("20260314-092653-5d3a")
    assert "[bold]" in lines[3]
    assert "conflict: [bold]" in shown
    assert "there is a copy on h1 too" in shown.replace("\n", " ")


def test_nothing_to_list_is_said() -> None:
    assert text(guests_table([])) == "No guests."
    assert text(migrations_table([], NOW)) == "No migrations."
    assert text(hosts_table([], 80, NOW)).startswith("No hosts")


def test_the_live_view_at_80_columns() -> None:
    lines = text(live_view(copying(0.4), NOW)).splitlines()
    assert lines[0] == "web-1  h1 → h2  COPYING  1 min 30 s"
    assert lines[1].endswith("40% of 1.00 GiB")
    assert lines[2] == "  410 MiB sent, 614 MiB left, 112 MiB/s, pass 2"
    assert lines[3] == "  guest dirties 21.0 MiB/s, CPUs throttled 20 %, pause if switched now 1.40 s"
    assert lines[4].startswith("  policy: throttle to 20 %")
    assert len(lines) == 5


def test_the_live_view_of_one_that_waits_or_prepares() -> None:
    waiting = a_migration((PLANNED,), waiting_for="another migration from h1 to h2")
    assert text(live_view(waiting, NOW)).splitlines()[1] == "  waits: another migration from h1 to h2"
    assert len(text(live_view(a_migration((PLANNED, PREPARING)), NOW)).splitlines()) == 1


def test_sentences() -> None:
    assert text(done_sentence(a_migration()), 1000) == (
        "web-1 runs on h2: took 15.6 s, guest paused for 84 ms (59 ms until all was sent, 9.1 ms commit, "
        "16 ms until it ran), 1.40 GiB of memory sent."
    )
    assert aborted_sentence(a_migration(UNDONE)) == (
        "migration 20260314-092653-5d3a was undone: cancelled by the operator while COPYING. web-1 is on h1 as before. "
        "Details: `handoff show 20260314-092653-5d3a`"
    )
    assert "`handoff watch 20260314-092653-5d3a`" in text(started_sentence(a_migration((PLANNED,))), 1000)
    assert "stays on h1" in text(cancel_sentence(copying(0.1)), 1000)
    assert "undone already" in text(cancel_sentence(a_migration(UNDONE)), 1000)


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.time = START

    def __call__(self) -> datetime:
        return self.time


def lines_of(*updates: tuple[float, Migration]) -> list[str]:
    """What a pipe gets from updates at these seconds."""
    out, clock = io.StringIO(), Clock()
    view = LinesView(Console(file=out, width=1000, markup=False, highlight=False), clock)
    for second, migration in updates:
        clock.time = START + timedelta(seconds=second)
        view(migration)
    return out.getvalue().splitlines()


def test_lines_name_every_state_once_though_an_update_brings_several() -> None:
    lines = lines_of((0, a_migration((PLANNED,))), (1, copying(0.1)), (2, a_migration()), (2, a_migration()))
    assert [line.split()[1] for line in lines] == [
        "PLANNED",
        "PREPARING",
        "COPYING",
        "SWITCHING",
        "COMMITTED",
        "FINISHING",
        "DONE",
    ]


def test_lines_of_progress_come_every_two_seconds_at_most() -> None:
    updates = [(index / 4, copying(index / 100, index)) for index in range(41)]
    lines = [line for line in lines_of(*updates) if "left" in line]
    assert 5 <= len(lines) <= 6
    assert "112 MiB/s" in lines[0]
    assert "policy: throttle" in lines[0]


def test_an_aborted_migration_has_its_reason_in_its_line() -> None:
    assert "  ABORTING  cancelled by the operator while COPYING" in lines_of((0, a_migration(UNDONE)))[3]


def test_samples_are_sound() -> None:
    assert a_migration().state == WHOLE_WAY[-1]
    assert a_migration(UNDONE).state == ABORTED
    assert SWITCHING in WHOLE_WAY
    assert copying(0.5).progress.ram_total_bytes == GIB


def test_a_rollout() -> None:
    assert "1 upgraded, 1 upgrading, 1 pending" in text(rollouts_table([a_rollout()], NOW), 140)
    shown = text(rollout_record(a_rollout(), NOW))
    assert "2 guests at a time, stops at the first failure." in shown
    assert "[x]" in shown
    assert "web-1  upgrading" in text(live_rollout(a_rollout(), NOW))


def test_how_a_rollout_ended() -> None:
    failed = a_rollout(state=RolloutState.ROLLOUT_STATE_FAILED, reason="db-2 failed: QEMU crashed")
    assert end_sentence(failed).startswith(
        "rollout 20260314-093106-77aa of h1 failed: db-2 failed: QEMU crashed. 1 upgraded, 1 upgrading, 1 pending."
    )
    done = a_rollout(state=RolloutState.ROLLOUT_STATE_DONE)
    assert end_sentence(done).startswith("h1 is through with QEMU build 10.0-rebuilt: 1 upgraded")
