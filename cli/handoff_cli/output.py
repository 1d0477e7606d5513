"""Where results go: stdout, for a terminal or for a pipe."""

import sys
from collections.abc import Callable

import click
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from rich.console import Console, RenderableType

from handoff_cli.options import Common

# Wide enough that nothing is folded where no terminal sets a width: each record stays one line.
PIPE_WIDTH = 1000


def stdout() -> Console:
    """A console that prints text as it is: names with brackets are no markup."""
    return Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def stderr() -> Console:
    """The same for what must not be mixed with the result."""
    return Console(markup=False, highlight=False, emoji=False, stderr=True)


def print_answer(common: Common, message: Message, render: Callable[[], RenderableType]) -> None:
    """Prints the message as `-o` says."""
    if common.output == "json":
        click.echo(to_json(message))
    else:
        stdout().print(render())


def to_json(message: Message, *, indent: int | None = 2) -> str:
    """A message in protobuf's JSON form, with the field names of the proto files; fields at their default too."""
    return MessageToJson(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True, indent=indent
    )
