"""`handoff list`."""

import click

from handoff_cli.client import Controllers
from handoff_cli.exits import Exit
from handoff_cli.options import Common, common_options
from handoff_cli.output import print_answer
from handoff_cli.render.migrations import migrations_table
from handoff_cli.run import run
from handoff_cli.units import now


@click.command("list")
@click.option("--active", is_flag=True, help="Only those that are under way.")
@click.option("--guest", default="", metavar="GUEST", help="Only those of this guest (name or UUID).")
@common_options
def command(common: Common, active: bool, guest: str) -> None:
    """List migrations, newest first."""

    async def work(controllers: Controllers) -> Exit:
        answer = await controllers.migrations(guest, active_only=active)
        print_answer(common, answer, lambda: migrations_table(answer.migrations, now()))
        return Exit.OK

    run(common, work)
