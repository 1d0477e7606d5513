"""`handoff recover`."""

import getpass
import os
import socket

import click

from handoff.controller.v1.migrations_pb2 import RecoverMigrationRequest, RecoveryTarget
from handoff_cli.client import Controllers
from handoff_cli.exits import Exit
from handoff_cli.options import Common, common_options
from handoff_cli.output import print_answer
from handoff_cli.render.migrations import recover_sentence
from handoff_cli.run import run

TARGETS = {
    "source": RecoveryTarget.RECOVERY_TARGET_SOURCE,
    "destination": RecoveryTarget.RECOVERY_TARGET_DESTINATION,
}


@click.command("recover")
@click.argument("migration_id", metavar="ID")
@click.option("--to", "target", required=True, type=click.Choice(list(TARGETS)), help="Where the guest is to go on.")
@click.option(
    "--i-have-fenced",
    "fenced_host",
    default="",
    metavar="HOST",
    help="You have made sure that HOST is off. If it is not, the guest may run twice and destroy its disks.",
)
@click.option(
    "--accept-loss",
    is_flag=True,
    help="What the guest did since the switch, and what it had not written to its disks, may be lost.",
)
@common_options
def command(common: Common, migration_id: str, target: str, fenced_host: str, accept_loss: bool) -> None:
    """Decide for a migration that can't go on by itself.

    `handoff show ID` says what is to be decided. ID is a migration's id, or an unambiguous beginning of it.

    \b
    --to source       runs the copy that the source holds. Only when the destination's can't run: its
                      agent says so, the controllers' fence command turns its host off, or you have
                      done so yourself (--i-have-fenced HOST).
    --to destination  waits for the destination, however long that takes. While it pulls disks from a
                      source that is gone for good (--i-have-fenced SOURCE --accept-loss): does without.
                      Otherwise --i-have-fenced is refused beside it.

    Refused (status 4), with the reason, where it would not be safe.
    """
    request = RecoverMigrationRequest(
        id=migration_id,
        target=TARGETS[target],
        fenced_host=fenced_host,
        accept_loss=accept_loss,
        by=f"{_user()}@{socket.gethostname()}",
    )

    async def work(controllers: Controllers) -> Exit:
        migration = await controllers.recover(request)
        print_answer(common, migration, lambda: recover_sentence(migration))
        return Exit.OK

    run(common, work)


def _user() -> str:
    try:
        return getpass.getuser()
    except KeyError:  # without a name on this machine
        return str(os.getuid())
