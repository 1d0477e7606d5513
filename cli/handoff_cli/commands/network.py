"""`handoff network`."""

import click

from handoff_cli.client import Controllers
from handoff_cli.exits import Exit
from handoff_cli.options import Common, common_options
from handoff_cli.output import print_answer
from handoff_cli.render.network import network_view
from handoff_cli.run import run


@click.command("network")
@click.argument("host", metavar="HOST")
@common_options
def command(common: Common, host: str) -> None:
    """Show the tenants' networks as one host has them.

    All ports of the fleet, which of them are on HOST, and where HOST sends frames to each.
    """

    async def work(controllers: Controllers) -> Exit:
        network = (await controllers.network(host)).network
        print_answer(common, network, lambda: network_view(host, network))
        return Exit.OK

    run(common, work)
