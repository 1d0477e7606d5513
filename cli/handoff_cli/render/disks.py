"""The disks of a guest that moves: what is done with each, and how far it is."""

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from handoff.agent.v1.disk_pb2 import DiskMove, DiskPhase, DiskProgress, DiskStrategy
from handoff.controller.v1.migrations_pb2 import Migration
from handoff_cli.render.parts import route, table
from handoff_cli.units import format_bytes, format_rate

_PHASES = {
    DiskPhase.DISK_PHASE_SENDING: "sent",
    DiskPhase.DISK_PHASE_IN_STEP: "sent, in step with the guest",
    DiskPhase.DISK_PHASE_PULLING: "pulled",
    DiskPhase.DISK_PHASE_COMPLETE: "pulled, complete",
}


def plan_view(migration: Migration) -> RenderableType:
    """After `migrate --dry-run`."""
    head = Text(f"{migration.guest_name}, {route(migration)}: nothing is in the way.")
    if not migration.disks:
        return Group(head, Text("It has no disks."))
    total = sum(move.bytes_to_send for move in migration.disks)
    later = sum(move.bytes_to_send for move in migration.disks if move.strategy == DiskStrategy.DISK_STRATEGY_PULL)
    sent = f"Disks to send: {format_bytes(total)} at the most"
    return Group(head, plan_table(migration.disks), Text(f"{sent}, {format_bytes(later)} of it after the switch."))


def plan_table(moves: Sequence[DiskMove]) -> Table:
    """One line a disk."""
    columns = ("DISK", "STRATEGY", "SIZE", "TO SEND", "AT THE DESTINATION", "WHY")
    made = table(columns, right=("SIZE", "TO SEND"), fold=columns[-2:])
    for move in moves:
        made.add_row(
            move.target,
            strategy_name(move),
            format_bytes(move.virtual_size_bytes) if move.virtual_size_bytes else "–",
            format_bytes(move.bytes_to_send) if move.bytes_to_send else "–",
            move.path or "–",
            move.reason,
        )
    return made


def strategy_name(move: DiskMove) -> str:
    """ "copy"."""
    return DiskStrategy.Name(move.strategy).removeprefix("DISK_STRATEGY_").lower()


def disk_facts(disks: Sequence[DiskProgress]) -> Iterator[str]:
    """How far each disk is, a piece each."""
    for disk in disks:
        blocked = ", guest writes wait for it" if disk.write_blocking else ""
        rate = f" at {format_rate(disk.bytes_per_s)}" if disk.bytes_per_s else ""
        trouble = f" ({disk.decision})" if disk.phase == DiskPhase.DISK_PHASE_PULLING and disk.decision else ""
        yield (
            f"disk {disk.target} {format_bytes(disk.done_bytes)} of {format_bytes(disk.total_bytes)} "
            f"{_PHASES.get(disk.phase, '')}{rate}{blocked}{trouble}"
        )
