"""A migration under way: a live view for terminals, lines for everything else."""

from collections.abc import Iterator
from datetime import datetime

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from handoff.agent.v1.disk_pb2 import DiskPhase
from handoff.agent.v1.qemu_pb2 import TransferProgress
from handoff.controller.v1.migrations_pb2 import Migration, MigrationState, StateChange
from handoff_cli.render.disks import disk_facts
from handoff_cli.render.migrations import lasted_s
from handoff_cli.render.parts import migration_state_text, moment, route, state_text
from handoff_cli.states import is_final, migration_state
from handoff_cli.units import format_bytes, format_clock, format_duration, format_ms, format_rate

COPIES = frozenset({MigrationState.MIGRATION_STATE_COPYING, MigrationState.MIGRATION_STATE_SWITCHING})


def progress_facts(progress: TransferProgress) -> tuple[str, ...]:
    """What one reading says, piece by piece."""
    memory = (*copy_facts(progress), *guest_facts(progress)) if progress.ram_total_bytes else ()
    return (*disk_facts(progress.disks), *memory)


def copy_facts(progress: TransferProgress) -> Iterator[str]:
    """How far the copy is."""
    yield f"{format_bytes(progress.ram_transferred_bytes)} sent"
    yield f"{format_bytes(progress.ram_remaining_bytes)} left"
    yield format_rate(progress.throughput_bytes_per_s)
    if progress.iterations:
        yield f"pass {progress.iterations}"


def guest_facts(progress: TransferProgress) -> Iterator[str]:
    """What the guest does to the copy, and the copy to the guest."""
    if progress.dirty_bytes_per_s:
        yield f"guest dirties {format_rate(progress.dirty_bytes_per_s)}"
    if progress.cpu_throttle_percent:
        yield f"CPUs throttled {progress.cpu_throttle_percent} %"
    # In the first pass nearly all memory is still to be sent, which says nothing of the pause to come.
    if progress.expected_downtime_ms and progress.iterations > 1:
        yield f"pause if switched now {format_ms(progress.expected_downtime_ms)}"


def pending_text(migration: Migration) -> Text | None:
    """What it waits for, or what is to be decided; None while it goes on."""
    if migration.needs_decision:
        return Text.assemble(("needs a decision: ", "bold red"), migration.needs_decision)
    if migration.waiting_for:
        return Text(f"waits: {migration.waiting_for}", "yellow")
    return None


def has_progress(migration: Migration) -> bool:
    """Whether there is a reading that says something about the state that it is in."""
    progress = migration.progress
    if migration.state == MigrationState.MIGRATION_STATE_FINISHING:
        return any(disk.phase == DiskPhase.DISK_PHASE_PULLING for disk in progress.disks)
    return migration.state in COPIES and (progress.ram_total_bytes > 0 or len(progress.disks) > 0)


def change_line(change: StateChange) -> Text:
    """A line for a state that was entered."""
    line = Text.assemble((format_clock(moment(change.time)), "dim"), "  ", state_text(migration_state(change.state)))
    return line.append(f"  {change.reason}") if change.reason else line


def progress_line(progress: TransferProgress) -> Text:
    """A line for one reading."""
    line = Text(f"{format_clock(moment(progress.time))}  {', '.join(progress_facts(progress))}")
    return line.append(f"; policy: {progress.decision}") if progress.decision else line


def live_view(migration: Migration, now: datetime) -> RenderableType:
    """The lines that change, below those of the states that it has been in."""
    head = Text.assemble(
        (migration.guest_name, "bold"), f"  {route(migration)}  ", migration_state_text(migration)
    ).append(f"  {format_duration(float(int(lasted_s(migration, now))))}")
    if is_final(migration):
        return Text()
    pending = pending_text(migration)
    if pending is not None:
        return Group(head, Text("  ").append_text(pending))
    if not has_progress(migration):
        return head
    progress = migration.progress
    disks = [Text(f"  {fact}") for fact in disk_facts(progress.disks)]
    if not progress.ram_total_bytes or migration.state not in COPIES:
        return Group(head, *disks)
    copied = max(0, progress.ram_total_bytes - progress.ram_remaining_bytes)
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        " ",
        ProgressBar(total=progress.ram_total_bytes, completed=copied, width=40),
        f"{copied / progress.ram_total_bytes:4.0%} of {format_bytes(progress.ram_total_bytes)}",
    )
    lines = [", ".join(copy_facts(progress)), ", ".join(guest_facts(progress))]
    if progress.decision:
        lines.append(f"policy: {progress.decision}")
    return Group(head, *disks, bar, *(Text(f"  {line}") for line in lines if line))
