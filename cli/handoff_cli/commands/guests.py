"""`handoff guests`."""

import click

from handoff_cli.client import Controllers
from handoff_cli.exits import Exit
from handoff_cli.options import Common, common_options
from handoff_cli.output import print_answer
from handoff_cli.render.fleet import guests_table
from handoff_cli.run import run


@click.command("guests")
@click.option("--host", default="", metavar="HOST", help="Only those of this host.")
@common_options
def command(common: Common, host: str) -> None:
    """List the guests."""

    async def work(controllers: Controllers) -> Exit:
        answer = await controllers.guests(host)
        print_answer(common, answer, lambda: guests_table(answer.guests))
        return Exit.OK

    run(common, work)
