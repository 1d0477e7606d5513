"""`handoff show`."""

import click

from handoff_cli.client import Controllers
from handoff_cli.exits import Exit
from handoff_cli.options import Common, common_options
from handoff_cli.output import print_answer
from handoff_cli.render.record import record
from handoff_cli.run import run
from handoff_cli.units import now


@click.command("show")
@click.argument("migration_id", metavar="ID")
@common_options
def command(common: Common, migration_id: str) -> None:
    """Show a migration: timeline, pause, figures.

    ID is a migration's id, or an unambiguous beginning of it.
    """

    async def work(controllers: Controllers) -> Exit:
        migration = await controllers.migration(migration_id)
        print_answer(common, migration, lambda: record(migration, now()))
        return Exit.OK

    run(common, work)
