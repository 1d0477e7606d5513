"""`handoff rollout`."""

import click

from handoff_cli.client import Controllers
from handoff_cli.exits import Exit
from handoff_cli.follow_rollout import follow_rollout
from handoff_cli.options import Common, common_options
from handoff_cli.output import print_answer
from handoff_cli.render.rollouts import cancelled_sentence, rollout_record
from handoff_cli.run import run, say_note
from handoff_cli.units import now


@click.command("rollout")
@click.argument("rollout_id", metavar="ID")
@click.option("--watch", is_flag=True, help="Follow it until it has ended.")
@click.option("--cancel", is_flag=True, help="Begin no more guests; upgrades under way are finished.")
@common_options
def command(common: Common, rollout_id: str, watch: bool, cancel: bool) -> None:
    """Show, follow or cancel the upgrade of a whole host.

    ID is a rollout's id, or an unambiguous beginning of it. With --watch the exit status is 0 when every guest has the
    new QEMU, 1 when one failed or it was cancelled; with -o json it prints one line of JSON an update.
    """

    async def work(controllers: Controllers) -> Exit:
        if cancel:
            rollout = await controllers.rollouts.cancel(rollout_id)
            if not watch:
                print_answer(common, rollout, lambda: cancelled_sentence(rollout))
                return Exit.OK
        if watch:
            return await follow_rollout(controllers, rollout_id, common.output)
        rollout = await controllers.rollouts.rollout(rollout_id)
        print_answer(common, rollout, lambda: rollout_record(rollout, now()))
        return Exit.OK

    run(common, work, lambda: say_note(f"rollout {rollout_id} is not followed any more; it goes on"))
