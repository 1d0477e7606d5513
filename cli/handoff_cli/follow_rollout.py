"""Shows a rollout until it has ended: live on a terminal, as lines elsewhere, or as JSON. As follow.py."""

from collections.abc import Callable
from contextlib import aclosing, nullcontext

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from handoff.controller.v1.rollouts_pb2 import Rollout, RolloutState
from handoff_cli.client import Controllers
from handoff_cli.exits import Exit
from handoff_cli.options import Output
from handoff_cli.output import stderr, stdout, to_json
from handoff_cli.render.rollouts import end_sentence, guest_line, live_rollout
from handoff_cli.run import say_error
from handoff_cli.states import is_ended
from handoff_cli.units import now

REFRESHES_PER_S = 4

Show = Callable[[Rollout], None]


class GuestLines:
    """One line each time that a guest gets further."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._states: dict[str, int] = {}

    def __call__(self, rollout: Rollout) -> None:
        """Prints what is new."""
        for guest in rollout.guests:
            known = self._states.get(guest.uuid)
            self._states[guest.uuid] = guest.state
            if known != guest.state and (known is not None or guest.migration_id or guest.reason):
                self._console.print(guest_line(guest, now()))


async def follow_rollout(controllers: Controllers, rollout_id: str, output: Output, *, last_only: bool = False) -> Exit:
    """Shows it until it has ended, then how. `last_only`: with JSON, only the final record goes to stdout."""
    latest = Rollout()
    every_json = output == "json" and not last_only
    console = stderr() if output == "json" else stdout()
    lines = GuestLines(console)
    live = (
        Live(
            console=console,
            get_renderable=lambda: live_rollout(latest, now()) if latest.id and not is_ended(latest) else Text(),
            refresh_per_second=REFRESHES_PER_S,
            transient=True,
        )
        if console.is_terminal and not every_json
        else nullcontext()
    )
    with live:
        async with aclosing(controllers.rollouts.watch(rollout_id)) as changes:
            async for latest in changes:
                if every_json:
                    click.echo(to_json(latest, indent=None))
                elif output == "table" or console.is_terminal:
                    lines(latest)
    if output == "json" and last_only:
        click.echo(to_json(latest))
    return print_end(latest, output)


def print_end(rollout: Rollout, output: Output) -> Exit:
    """Says how a rollout that has ended went."""
    if rollout.state != RolloutState.ROLLOUT_STATE_DONE:
        say_error(end_sentence(rollout))
        return Exit.ABORTED
    if output == "table":
        stdout().print(Text(end_sentence(rollout), "green"))
    return Exit.OK
