"""`handoff rollouts`."""

import click

from handoff_cli.client import Controllers
from handoff_cli.exits import Exit
from handoff_cli.options import Common, common_options
from handoff_cli.output import print_answer
from handoff_cli.render.rollouts import rollouts_table
from handoff_cli.run import run
from handoff_cli.units import now


@click.command("rollouts")
@click.option("--active", is_flag=True, help="Only those that are under way.")
@click.option("--host", default="", metavar="HOST", help="Only those of this host.")
@common_options
def command(common: Common, active: bool, host: str) -> None:
    """List upgrades of whole hosts, newest first."""

    async def work(controllers: Controllers) -> Exit:
        answer = await controllers.rollouts.rollouts(host, active_only=active)
        print_answer(common, answer, lambda: rollouts_table(answer.rollouts, now()))
        return Exit.OK

    run(common, work)
