"""The table of migrations, and what there is to say of one in a sentence."""

from collections.abc import Sequence
from datetime import datetime

from rich.console import RenderableType
from rich.text import Text

from handoff.controller.v1.migrations_pb2 import Migration, MigrationKind, Outcome, RecoveryTarget
from handoff_cli.render.parts import migration_state_text, moment, route, table
from handoff_cli.states import ABORTED
from handoff_cli.units import format_age, format_bytes, format_duration, format_ms


def migrations_table(migrations: Sequence[Migration], now: datetime) -> RenderableType:
    """One line a migration."""
    if not migrations:
        return Text("No migrations.")
    made = table(
        ("MIGRATION", "GUEST", "FROM → TO", "AGE", "TOOK", "PAUSE", "STATE"),
        right=("AGE", "TOOK", "PAUSE"),
        fold=("GUEST", "FROM → TO", "STATE"),
    )
    for migration in migrations:
        pause_ms = migration.outcome.downtime_ms
        made.add_row(
            migration.id,
            migration.guest_name,
            route(migration),
            format_age((now - moment(migration.create_time)).total_seconds()),
            format_duration(lasted_s(migration, now)),
            format_ms(pause_ms) if pause_ms else "–",
            migration_state_text(migration),
        )
    return made


def lasted_s(migration: Migration, now: datetime) -> float:
    """Seconds from creation until its end, or until now."""
    end = moment(migration.end_time) if migration.HasField("end_time") else now
    return max(0.0, (end - moment(migration.create_time)).total_seconds())


def started_sentence(migration: Migration) -> Text:
    """After `migrate` without --wait."""
    waiting = f" It waits: {migration.waiting_for}." if migration.waiting_for else ""
    return Text(
        f"Migration {migration.id} of {migration.guest_name}, {route(migration)}, is accepted.{waiting} "
        f"`handoff watch {migration.id}` follows it."
    )


def cancel_sentence(migration: Migration) -> Text:
    """After `cancel`."""
    if migration.state == ABORTED:
        return Text(
            f"Migration {migration.id} is undone already; {migration.guest_name} is on {migration.source.host}."
        )
    return Text(
        f"Migration {migration.id} is being undone; {migration.guest_name} stays on {migration.source.host}. "
        f"`handoff watch {migration.id}` follows it."
    )


def recover_sentence(migration: Migration) -> Text:
    """After `recover`."""
    source, destination = migration.source.host, migration.destination.host
    if migration.loss.host == source:
        what = f"is given up; {migration.guest_name} is lost with {source}"
    elif migration.recovery.fenced_host == source:
        what = f"waits for {source} no more: {migration.guest_name} is not whole on {destination}"
    elif migration.loss.certain:
        what = f"leaves {migration.guest_name} to {destination}: start it there"
    elif migration.recovery.target == RecoveryTarget.RECOVERY_TARGET_SOURCE:
        what = f"is taken back; {migration.guest_name} runs on {source}"
    else:
        what = f"waits for {destination}; the copy on {source} stays as it is"
    return Text(f"Migration {migration.id} {what}. `handoff watch {migration.id}` follows it.")


def done_sentence(migration: Migration) -> Text:
    """How a migration that is DONE went."""
    outcome = migration.outcome
    where = migration.destination.host
    if migration.kind == MigrationKind.MIGRATION_KIND_UPGRADE:
        where += f" under QEMU build {migration.release}"
    text = Text.assemble((f"{migration.guest_name} runs on {where}", "green"))
    text.append(f": took {format_ms(outcome.total_ms)}, guest paused for {pause_sentence(outcome)}")
    if outcome.ram_bytes:
        text.append(f", {format_bytes(outcome.ram_bytes)} of memory sent")
    return text.append(".")


def pause_sentence(outcome: Outcome) -> str:
    """ "84 ms (60 ms at the source, 9 ms commit, 15 ms resume)"; without the parts where they are not known."""
    total = format_ms(outcome.downtime_ms)
    if not outcome.committed_to_running_ms:
        return total
    return (
        f"{total} ({format_ms(outcome.paused_to_held_ms)} until all was sent, "
        f"{format_ms(outcome.held_to_committed_ms)} commit, "
        f"{format_ms(outcome.committed_to_running_ms)} until it ran)"
    )


def aborted_sentence(migration: Migration) -> str:
    """Why a migration is ABORTED, where the guest is, and what to do."""
    reason = migration.error or "no reason is recorded"
    paused = migration.outcome.downtime_ms
    pause = f", after a pause of {format_ms(paused)}" if paused else ""
    if migration.HasField("loss"):
        return lost_sentence(migration)
    return (
        f"migration {migration.id} was undone: {reason.rstrip('.')}. {migration.guest_name} is on "
        f"{migration.source.host} as before{pause}. Details: `handoff show {migration.id}`"
    )


def lost_sentence(migration: Migration) -> str:
    """What is known of a guest that does not run, or may not."""
    what = "is lost" if migration.loss.certain else "may be lost"
    return (
        f"{migration.guest_name} {what}: {migration.loss.reason.rstrip('.')} (migration {migration.id}). "
        f"Details: `handoff show {migration.id}`"
    )
