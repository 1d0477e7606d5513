"""`handoff watch`."""

import click

from handoff_cli.client import Controllers
from handoff_cli.exits import Exit
from handoff_cli.follow import follow
from handoff_cli.options import Common, common_options
from handoff_cli.run import run, say_note


@click.command("watch")
@click.argument("migration_id", metavar="ID")
@common_options
def command(common: Common, migration_id: str) -> None:
    """Follow a migration until it is final.

    ID is a migration's id, or an unambiguous beginning of it. With -o json: one line of JSON an update.
    The exit status is 0 when the guest runs where it was asked to, 1 when the migration was undone.
    """

    async def work(controllers: Controllers) -> Exit:
        return await follow(controllers, migration_id, common.output)

    run(common, work, lambda: say_note(f"migration {migration_id} is not followed any more; it goes on"))
