"""What all commands have in common on their command line."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, Literal, ParamSpec, TypeVar, cast

import click

from handoff_cli.units import parse_duration, parse_rate

Output = Literal["table", "json"]
P = ParamSpec("P")
R = TypeVar("R")


def rate(text: str) -> int:
    """Type of an option that is a rate: bytes per second."""
    try:
        return parse_rate(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def duration(given: str | float) -> float:
    """Type of an option that is a time: seconds. A float has been converted before."""
    try:
        return given if isinstance(given, float) else parse_duration(given)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@dataclass(frozen=True, slots=True)
class Common:
    """The options that every command takes."""

    controller: str | None
    deadline_s: float
    output: Output


OPTIONS = (
    click.option(
        "--controller",
        metavar="ADDR[,ADDR…]",
        help="Controllers to ask, in this order: HOST:PORT or unix:/PATH. "
        "Default: $HANDOFF_CONTROLLER, ~/.config/handoff/cli.toml, /etc/handoff/cli.toml.",
    ),
    click.option(
        "--deadline",
        type=duration,
        metavar="TIME",
        default="30s",
        help="Longest to wait for a word from any controller. Default: 30s.",
    ),
    click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json"]),
        default="table",
        help="For people (default), or the API's message as JSON.",
    ),
)


def common_options(command: Callable[Concatenate[Common, P], R]) -> Callable[P, R]:
    """Adds the options, and hands them to the command as its first argument."""

    @wraps(command)
    def with_common(*args: P.args, **kwargs: P.kwargs) -> R:
        common = Common(
            controller=cast(str | None, kwargs.pop("controller")),
            deadline_s=cast(float, kwargs.pop("deadline")),
            output=cast(Output, kwargs.pop("output")),
        )
        return command(common, *args, **kwargs)

    wrapped = with_common
    for option in reversed(OPTIONS):
        wrapped = option(wrapped)
    return wrapped
