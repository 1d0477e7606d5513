"""Shows a migration until it is final: live on a terminal, as lines elsewhere, or as JSON."""

from collections.abc import Callable
from contextlib import AbstractContextManager, aclosing, nullcontext
from datetime import datetime
from types import TracebackType
from typing import Self

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from handoff.controller.v1.migrations_pb2 import Migration
from handoff_cli.client import Controllers
from handoff_cli.exits import Exit
from handoff_cli.options import Output
from handoff_cli.output import stderr, stdout, to_json
from handoff_cli.render.migrations import aborted_sentence, done_sentence, lost_sentence
from handoff_cli.render.progress import change_line, has_progress, live_view, pending_text, progress_line
from handoff_cli.run import say_error, say_warning
from handoff_cli.states import DONE
from handoff_cli.units import now

PROGRESS_LINE_S = 2.0
REFRESHES_PER_S = 4

Show = Callable[[Migration], None]


class LinesView:
    """One line a state that was entered, and at most one a PROGRESS_LINE_S seconds for the copy."""

    def __init__(self, console: Console, clock: Callable[[], datetime] = now) -> None:
        self._console = console
        self._clock = clock
        self._changes = 0
        self._progress_at: datetime | None = None
        self._pending = ""

    def __call__(self, migration: Migration) -> None:
        """Prints what is new."""
        # An update may bring several states: the record's own timeline has them all.
        for change in migration.timeline[self._changes :]:
            self._console.print(change_line(change))
        changed = len(migration.timeline) > self._changes
        self._changes = len(migration.timeline)
        pending = pending_text(migration)
        if pending is not None and str(pending) != self._pending:
            self._pending = str(pending)
            self._console.print(pending)
        due = self._progress_at is None or (self._clock() - self._progress_at).total_seconds() >= PROGRESS_LINE_S
        if has_progress(migration) and due and not changed:
            self._progress_at = self._clock()
            self._console.print(progress_line(migration.progress))


class TerminalView(AbstractContextManager["TerminalView"]):
    """Lines for the states that it has been in; below them what changes, redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._latest: Migration | None = None
        self._changes = 0
        self._live = Live(
            console=console,
            get_renderable=lambda: live_view(self._latest, now()) if self._latest else Text(),
            refresh_per_second=REFRESHES_PER_S,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def __call__(self, migration: Migration) -> None:
        """Takes the newest."""
        self._latest = migration
        for change in migration.timeline[self._changes :]:
            self._console.print(change_line(change))
        self._changes = len(migration.timeline)


def _json_line(migration: Migration) -> None:
    click.echo(to_json(migration, indent=None))


def _nothing(migration: Migration) -> None:
    """Somebody waits only for the end."""


def _view(output: Output, *, last_only: bool) -> AbstractContextManager[Show]:
    if output == "json" and not last_only:
        return nullcontext(_json_line)
    console = stderr() if output == "json" else stdout()
    if console.is_terminal:
        return TerminalView(console)
    return nullcontext(_nothing if output == "json" else LinesView(console))


async def follow(controllers: Controllers, migration_id: str, output: Output, *, last_only: bool = False) -> Exit:
    """Shows it until it is final, then how it ended. `last_only`: with JSON, only the final record goes to stdout."""
    latest = Migration()
    with _view(output, last_only=last_only) as show:
        async with aclosing(controllers.watch(migration_id)) as changes:
            async for latest in changes:
                show(latest)
    if output == "json" and last_only:
        click.echo(to_json(latest))
    return print_result(latest, output)


def print_result(migration: Migration, output: Output) -> Exit:
    """Says how a final migration ended; its warnings and why it was undone go to stderr."""
    for warning in migration.warnings:
        say_warning(warning)
    if migration.state != DONE:
        say_error(aborted_sentence(migration))
        return Exit.ABORTED
    if migration.HasField("loss"):
        say_error(lost_sentence(migration))
        return Exit.ABORTED
    if output == "table":
        stdout().print(done_sentence(migration))
    return Exit.OK
