"""Pieces that all views share: a table's looks, colours of states, times of messages."""

from collections.abc import Sequence
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp
from rich.table import Table
from rich.text import Text

from handoff.controller.v1.migrations_pb2 import GuestLoss, Migration, Placement
from handoff_cli.states import migration_state

STYLES = {
    "DONE": "green",
    "ABORTED": "red",
    "ABORTING": "yellow",
    "SWITCHING": "bold magenta",
    "UP": "green",
    "DOWN": "bold red",
    "DEGRADED": "yellow",
    "running": "green",
    "paused": "yellow",
    "lost": "bold red",
    "unreachable": "bold red",
}


def table(columns: Sequence[str], *, right: Sequence[str] = (), fold: Sequence[str] = ()) -> Table:
    """An empty table. `right`: columns of numbers; `fold`: those that may be folded where the terminal is narrow."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(
            column, justify="right" if column in right else "left", no_wrap=column not in fold, overflow="fold"
        )
    return made


def state_text(name: str) -> Text:
    """A state in its colour."""
    return Text(name, style=STYLES.get(name, "cyan"))


def migration_state_text(migration: Migration) -> Text:
    """The migration's state, marked where something is worth a look."""
    name = migration_state(migration.state)
    if migration.needs_decision:
        return Text(f"{name}, needs a decision", style="bold red")
    if migration.HasField("loss"):
        return Text(f"{name}, guest {loss_state(migration.loss)}", style="bold red")
    if name == "DONE" and migration.warnings:
        return Text("DONE, warnings", style="yellow")
    if migration.cancel_requested and name not in ("ABORTING", "ABORTED", "DONE"):
        return Text(f"{name}, cancelled", style="yellow")
    return state_text(name)


def loss_state(loss: GuestLoss) -> str:
    """ "lost" where that is certain, "unreachable" where nobody knows."""
    return "lost" if loss.certain else "unreachable"


def moment(stamp: Timestamp) -> datetime:
    """A message's time."""
    return stamp.ToDatetime(tzinfo=UTC)


def place(placement: Placement) -> str:
    """ "h1/a"."""
    return f"{placement.host}/{placement.slot}" if placement.slot else placement.host


def route(migration: Migration) -> str:
    """ "h1 → h2", with the slots where the host is the same."""
    source, destination = migration.source, migration.destination
    if source.host == destination.host:
        return f"{place(source)} → {place(destination)}"
    return f"{source.host} → {destination.host}"
