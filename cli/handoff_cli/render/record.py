"""One migration in full: `handoff show`."""

from collections.abc import Iterator
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from handoff.controller.v1.migrations_pb2 import Migration, MigrationKind, MigrationOptions, Recovery, RecoveryTarget
from handoff_cli.render.disks import plan_table
from handoff_cli.render.migrations import lasted_s
from handoff_cli.render.parts import loss_state, migration_state_text, moment, place, state_text, table
from handoff_cli.render.progress import progress_facts
from handoff_cli.states import DONE, is_final, migration_state
from handoff_cli.units import (
    format_age,
    format_bytes,
    format_clock,
    format_date,
    format_duration,
    format_ms,
    format_rate,
)


def record(migration: Migration, now: datetime) -> RenderableType:
    """Head, timeline, figures, and what went wrong."""
    parts: list[RenderableType] = [_facts(migration, now), Text(), _timeline(migration, now)]
    if migration.disks:
        parts += [Text(), plan_table(migration.disks)]
    figures = tuple(_figures(migration))
    if figures:
        parts += [Text(), _pairs(figures)]
    if migration.needs_decision:
        parts += [Text(), Text.assemble(("needs a decision: ", "bold red"), migration.needs_decision)]
    if migration.HasField("loss"):
        loss = migration.loss
        noticed = f" ({'noticed' if loss.certain else 'last seen'} {format_date(moment(loss.time))})"
        parts += [Text(), Text.assemble((f"{loss_state(loss)}: ", "bold red"), loss.reason, noticed)]
    for warning in migration.warnings:
        parts += [Text(), Text.assemble(("warning: ", "bold yellow"), warning)]
    if migration.error:
        label = "error: " if migration.state == DONE else "undone because: "
        parts += [Text(), Text.assemble((label, "bold red"), migration.error)]
    return Group(*parts)


def _pairs(rows: tuple[tuple[str, str | Text], ...]) -> Table:
    made = Table.grid(padding=(0, 2))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(name, value)
    return made


def _facts(migration: Migration, now: datetime) -> Table:
    created = moment(migration.create_time)
    age = f"{format_date(created)}, {format_age((now - created).total_seconds())} ago"
    rows: list[tuple[str, str | Text]] = [
        ("Migration", migration.id),
        ("State", migration_state_text(migration)),
        ("Guest", f"{migration.guest_name} ({migration.guest_uuid})"),
        ("From → to", f"{place(migration.source)} → {place(migration.destination)}"),
        *_plan(migration),
        ("Created", age.replace("now ago", "now")),
        ("Options", _options(migration.options)),
    ]
    if not is_final(migration):
        rows.append(("So far", format_duration(lasted_s(migration, now))))
    if migration.waiting_for:
        rows.append(("Waits for", migration.waiting_for))
    if migration.HasField("recovery"):
        rows.append(("Decided", _decided(migration.recovery)))
    return _pairs(tuple(rows))


def _decided(recovery: Recovery) -> str:
    target = "the source" if recovery.target == RecoveryTarget.RECOVERY_TARGET_SOURCE else "the destination"
    return f"for {target} by {recovery.by}, {format_date(moment(recovery.time))}: {recovery.how}"


def _plan(migration: Migration) -> Iterator[tuple[str, str | Text]]:
    if migration.kind == MigrationKind.MIGRATION_KIND_UPGRADE:
        yield "New QEMU", migration.release
        yield "Way", migration.plan


def _options(options: MigrationOptions) -> str:
    bandwidth = format_rate(options.bandwidth_bytes_per_s) if options.bandwidth_bytes_per_s else "no limit"
    parts = [f"bandwidth {bandwidth}", f"downtime limit {format_ms(options.downtime_limit_ms)}"]
    for name, field in (("switch deadline", options.switch_deadline), ("timeout", options.timeout)):
        parts.append(f"{name} {format_duration(field.ToTimedelta().total_seconds())}")
    if options.fast:
        parts.append("fast")
    if options.keep_source_disks:
        parts.append("the source's disks are kept")
    return ", ".join(parts)


def _timeline(migration: Migration, now: datetime) -> RenderableType:
    made = table(("STATE", "ENTERED", "LASTED", "REASON"), right=("LASTED",), fold=("REASON",))
    changes = migration.timeline
    for number, change in enumerate(changes):
        entered = moment(change.time)
        last = number + 1 == len(changes)
        until = now if last else moment(changes[number + 1].time)
        lasted = "" if last and is_final(migration) else format_duration((until - entered).total_seconds())
        made.add_row(state_text(migration_state(change.state)), format_clock(entered), lasted, change.reason)
    return made


def _figures(migration: Migration) -> Iterator[tuple[str, str | Text]]:
    outcome = migration.outcome
    if outcome.total_ms:
        yield "Total", format_ms(outcome.total_ms)
    if outcome.downtime_ms:
        yield "Guest pause", format_ms(outcome.downtime_ms)
    if outcome.paused_to_held_ms:
        qemus = f" (QEMU's own downtime {format_ms(outcome.qemu_downtime_ms)})" if outcome.qemu_downtime_ms else ""
        yield "  paused → held", f"{format_ms(outcome.paused_to_held_ms)}{qemus}"
    if outcome.held_to_committed_ms:
        yield "  held → committed", format_ms(outcome.held_to_committed_ms)
    if outcome.committed_to_running_ms:
        yield "  committed → running", format_ms(outcome.committed_to_running_ms)
    if outcome.ram_bytes:
        passes = (
            f" in {outcome.iterations} {'pass' if outcome.iterations == 1 else 'passes'}" if outcome.iterations else ""
        )
        yield "Memory sent", f"{format_bytes(outcome.ram_bytes)}{passes}"
    if not is_final(migration) and migration.HasField("progress"):
        yield "Copy", ", ".join(progress_facts(migration.progress))
        if migration.progress.decision:
            yield "Policy", migration.progress.decision
