"""`handoff hosts`."""

import click

from handoff_cli.client import Controllers
from handoff_cli.exits import Exit
from handoff_cli.options import Common, common_options
from handoff_cli.output import print_answer, stdout
from handoff_cli.render.fleet import hosts_table
from handoff_cli.run import run
from handoff_cli.units import now


@click.command("hosts")
@common_options
def command(common: Common) -> None:
    """List the hosts."""

    async def work(controllers: Controllers) -> Exit:
        answer = await controllers.hosts()
        print_answer(common, answer, lambda: hosts_table(answer.hosts, stdout().width, now()))
        return Exit.OK

    run(common, work)
