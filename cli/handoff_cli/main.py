"""`handoff`: the operators' command. Here are only the names of its commands, so that help comes at once.

A command's module imports gRPC, which takes longer than all the rest; it is loaded when the command is run.
"""

import importlib
import os
from importlib.metadata import version

import click

from handoff_cli.exits import EXIT_HELP
from handoff_cli.options import OPTIONS

DEFAULT = click.core.ParameterSource.DEFAULT

COMMANDS = {
    "migrate": "Move a running guest to another host.",
    "upgrade": "Give a running guest, or all of a host, another QEMU.",
    "cancel": "Undo a migration; the guest stays where it is.",
    "recover": "Decide for a migration that can't go on by itself.",
    "list": "List migrations, newest first.",
    "show": "Show a migration: timeline, pause, figures.",
    "watch": "Follow a migration until it is final.",
    "rollouts": "List upgrades of whole hosts, newest first.",
    "rollout": "Show, follow or cancel the upgrade of a whole host.",
    "hosts": "List the hosts.",
    "guests": "List the guests.",
    "network": "Show the tenants' networks as one host has them.",
}


class LazyGroup(click.Group):
    """Loads the module of a command when it is asked for; lists them without."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"handoff_cli.commands.{cmd_name}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of commands."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    epilog=EXIT_HELP,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(version("handoff"), prog_name="handoff")
@click.pass_context
def cli(ctx: click.Context, /, **given: object) -> None:
    """Move running KVM guests between hosts."""
    # What is given before the command's name counts for the command, unless it is given there too.
    chosen = {key: value for key, value in given.items() if ctx.get_parameter_source(key) is not DEFAULT}
    ctx.default_map = dict.fromkeys(COMMANDS, chosen)


for _option in reversed(OPTIONS):
    cli = _option(cli)


def main() -> None:
    """The entry point."""
    # gRPC's own lines about lost connections mean nothing to an operator; our errors say what matters.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    cli(prog_name="handoff")
