"""`handoff upgrade`."""

from typing import NoReturn

import click

from handoff.controller.v1.migrations_pb2 import CreateUpgradeRequest
from handoff.controller.v1.rollouts_pb2 import CreateRolloutRequest
from handoff_cli.client import Controllers, new_request_id
from handoff_cli.commands.migrate import checked_id, migration_options
from handoff_cli.exits import Exit
from handoff_cli.follow import follow, print_result
from handoff_cli.follow_rollout import follow_rollout
from handoff_cli.options import Common, common_options, duration
from handoff_cli.output import print_answer
from handoff_cli.render.migrations import started_sentence
from handoff_cli.render.rollouts import accepted_sentence
from handoff_cli.run import run, say_note
from handoff_cli.states import is_final
from handoff_cli.units import now


@click.command("upgrade")
@click.argument("guest", metavar="[GUEST]", required=False)
@click.option("--host", metavar="HOST", help="All guests that run on this host, instead of one.")
@click.option(
    "--to",
    "release",
    metavar="RELEASE",
    default="",
    help="Name of a QEMU build of the host, or its release where only one has it. Default: the host's preferred one.",
)
@click.option("--wait", is_flag=True, help="Show progress and return when it is final. Ctrl-C detaches.")
@click.option(
    "--parallel",
    type=click.IntRange(1, 16),
    metavar="N",
    help="With --host: guests at one time; the controller's own limit applies too. Default: 1.",
)
@click.option("--keep-going", is_flag=True, help="With --host: a guest that fails does not stop the others.")
@click.option(
    "--downtime-limit", type=click.IntRange(min=1), metavar="MS", help="Pause to aim at. Default: 300 (milliseconds)."
)
@click.option(
    "--switch-deadline",
    type=duration,
    metavar="TIME",
    help="Longest pause before the switch is given up and the guest runs on under its old QEMU. Default: 2s.",
)
@click.option(
    "--timeout", type=duration, metavar="TIME", help="Longest time until the switch, then it is undone. Default: 30m."
)
@click.option(
    "--request-id",
    metavar="ID",
    callback=checked_id,
    help="The upgrade's id, of your choice: repeating the command with it starts nothing anew.",
)
@common_options
def command(
    common: Common,
    guest: str | None,
    host: str | None,
    release: str,
    wait: bool,
    parallel: int | None,
    keep_going: bool,
    downtime_limit: int | None,
    switch_deadline: float | None,
    timeout: float | None,
    request_id: str | None,
) -> None:
    """Give a running guest, or all of a host, another QEMU.

    GUEST is a name or a UUID. Without --wait it returns once the upgrade has been accepted (status 0); with it,
    status 0 means that the guest runs under the new QEMU, and 1 that it runs on under the old one.
    An upgrade is a migration between the host's two slots: show, watch, list and cancel take its id.

    With --host it is a rollout: each guest is upgraded in its turn, and the first that fails stops it; `handoff
    rollout ID` shows, follows and cancels it. Status 1 means that one failed, or that it was cancelled.
    TIME is in seconds, or a number with ms, s, m or h.
    """
    if (guest is None) == (host is None):
        raise click.UsageError("name a guest, or a host with --host")
    if host is None and (parallel or keep_going):
        raise click.UsageError("--parallel and --keep-going are for --host")
    options = migration_options(None, downtime_limit, switch_deadline, timeout)
    chosen_id = request_id or new_request_id(now())
    if guest is not None:
        _upgrade(
            common, CreateUpgradeRequest(guest=guest, release=release, options=options, request_id=chosen_id), wait
        )
    elif host is not None:
        rollout = CreateRolloutRequest(
            host=host,
            release=release,
            parallel=parallel or 0,
            keep_going=keep_going,
            options=options,
            request_id=chosen_id,
        )
        _roll_out(common, rollout, wait)


def _upgrade(common: Common, request: CreateUpgradeRequest, wait: bool) -> NoReturn:
    async def work(controllers: Controllers) -> Exit:
        migration = await controllers.create_upgrade(request)
        if wait:
            return await follow(controllers, migration.id, common.output, last_only=True)
        print_answer(common, migration, lambda: started_sentence(migration))
        return print_result(migration, common.output) if is_final(migration) else Exit.OK

    def interrupted() -> None:
        say_note(
            f"if it was started, it goes on as migration {request.request_id}: `handoff watch {request.request_id}` "
            f"shows it, `handoff cancel {request.request_id}` undoes it"
        )

    run(common, work, interrupted)


def _roll_out(common: Common, request: CreateRolloutRequest, wait: bool) -> NoReturn:
    async def work(controllers: Controllers) -> Exit:
        rollout = await controllers.rollouts.create(request)
        if wait:
            return await follow_rollout(controllers, rollout.id, common.output, last_only=True)
        print_answer(common, rollout, lambda: accepted_sentence(rollout))
        return Exit.OK

    def interrupted() -> None:
        say_note(
            f"if it was started, it goes on as rollout {request.request_id}: `handoff rollout {request.request_id} "
            f"--watch` shows it, `handoff rollout {request.request_id} --cancel` begins no more guests"
        )

    run(common, work, interrupted)
