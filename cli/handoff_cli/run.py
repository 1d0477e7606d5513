"""Runs one command: finds controllers, turns errors into one sentence on stderr and an exit status."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import NoReturn

import click
import grpc.aio
from rich.text import Text

from handoff_cli.addresses import find_controllers
from handoff_cli.client import Controllers
from handoff_cli.exits import Exit
from handoff_cli.options import Common
from handoff_cli.output import stderr
from handoff_common.errors import (
    DeadlineError,
    ExhaustedError,
    HandoffError,
    InvalidArgumentError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)

EXITS: Mapping[type[HandoffError], Exit] = {
    InvalidArgumentError: Exit.USAGE,
    NotFoundError: Exit.NOT_FOUND,
    PreconditionError: Exit.REFUSED,
    UnavailableError: Exit.UNAVAILABLE,
    DeadlineError: Exit.UNAVAILABLE,
    ExhaustedError: Exit.EXHAUSTED,
}


def run(
    common: Common, work: Callable[[Controllers], Awaitable[Exit]], on_interrupt: Callable[[], None] | None = None
) -> NoReturn:
    """Does `work` and ends the process with its exit status. `on_interrupt` says what Ctrl-C has left as it is."""
    try:
        status = asyncio.run(_connected(common, work))
    except HandoffError as error:
        say_error(error.message)
        status = status_of(error)
    except KeyboardInterrupt:
        if on_interrupt is not None:
            on_interrupt()
        status = Exit.INTERRUPTED
    click.get_current_context().exit(status)


def status_of(error: HandoffError) -> Exit:
    """The exit status of an error, by its gRPC status."""
    return next((status for kind, status in EXITS.items() if kind.code is error.code), Exit.INTERNAL)


async def _connected(common: Common, work: Callable[[Controllers], Awaitable[Exit]]) -> Exit:
    # Held for the life of the process: gRPC that shuts down as its last channel closes can abort the process, when its
    # poller still waits on what is being closed (seen with 1.85 on a busy machine).
    grpc.aio.init_grpc_aio()
    said: set[str] = set()

    def say_once(trouble: str) -> None:
        if trouble not in said:
            said.add(trouble)
            say_note(trouble)

    async with Controllers(find_controllers(common.controller), common.deadline_s, say_once) as controllers:
        return await work(controllers)


def say_error(sentence: str) -> None:
    """What failed and what to do, on stderr."""
    _say("error: ", "bold red", sentence)


def say_warning(sentence: str) -> None:
    """What went wrong without changing the result, on stderr."""
    _say("warning: ", "bold yellow", sentence)


def say_note(sentence: str) -> None:
    """What a person may want to know meanwhile, on stderr."""
    _say("note: ", "bold", sentence)


def _say(label: str, style: str, sentence: str) -> None:
    stderr().print(Text.assemble((label, style), " ".join(sentence.split())), soft_wrap=True)
