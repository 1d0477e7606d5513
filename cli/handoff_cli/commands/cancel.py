"""`handoff cancel`."""

import click

from handoff_cli.client import Controllers
from handoff_cli.exits import Exit
from handoff_cli.options import Common, common_options
from handoff_cli.output import print_answer
from handoff_cli.render.migrations import cancel_sentence
from handoff_cli.run import run


@click.command("cancel")
@click.argument("migration_id", metavar="ID")
@common_options
def command(common: Common, migration_id: str) -> None:
    """Undo a migration; the guest stays where it is.

    ID is a migration's id, or an unambiguous beginning of it. Returns once the wish is recorded. Refused (status 4)
    when the guest has already moved.
    """

    async def work(controllers: Controllers) -> Exit:
        migration = await controllers.cancel(migration_id)
        print_answer(common, migration, lambda: cancel_sentence(migration))
        return Exit.OK

    run(common, work)
