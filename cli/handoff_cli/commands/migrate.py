"""`handoff migrate`."""

import re
from datetime import timedelta

import click

from handoff.controller.v1.migrations_pb2 import CreateMigrationRequest, MigrationOptions
from handoff_cli.client import Controllers, new_request_id
from handoff_cli.exits import Exit
from handoff_cli.follow import follow, print_result
from handoff_cli.options import Common, common_options, duration, rate
from handoff_cli.output import print_answer
from handoff_cli.render.disks import plan_view
from handoff_cli.render.migrations import started_sentence
from handoff_cli.run import run, say_note
from handoff_cli.states import is_final
from handoff_cli.units import now
from handoff_common.errors import DeadlineError

REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")


def checked_id(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Callback of --request-id: what no id can be is a usage error."""
    if value is not None and not REQUEST_ID.fullmatch(value):
        raise click.BadParameter("letters, digits and dashes, at most 64, not a dash first", ctx, param)
    return value


@click.command("migrate")
@click.argument("guest", metavar="GUEST")
@click.option("--to", "host", required=True, metavar="HOST", help="The host that it moves to.")
@click.option("--wait", is_flag=True, help="Show progress and return when it is final. Ctrl-C detaches.")
@click.option(
    "--bandwidth",
    type=rate,
    metavar="RATE",
    help="Largest rate of the copy, such as 1gbit or 100MiB/s. Default: no limit.",
)
@click.option(
    "--downtime-limit", type=click.IntRange(min=1), metavar="MS", help="Pause to aim at. Default: 300 (milliseconds)."
)
@click.option(
    "--switch-deadline",
    type=duration,
    metavar="TIME",
    help="Longest pause before the switch is given up and the guest runs on where it was. Default: 2s.",
)
@click.option(
    "--timeout",
    type=duration,
    metavar="TIME",
    help="Longest time until the switch, then it is undone. Default: 30m, and more for big disks.",
)
@click.option(
    "--fast", is_flag=True, help="Local disks: the guest moves at once and the rest is pulled after it, while it runs."
)
@click.option("--keep-source-disks", is_flag=True, help="Leave the copied disks' images at the source when it is done.")
@click.option(
    "--dry-run", is_flag=True, help="Only say what would be done with each disk, and why; nothing is touched."
)
@click.option(
    "--request-id",
    metavar="ID",
    callback=checked_id,
    help="The migration's id, of your choice: repeating the command with it starts nothing anew.",
)
@common_options
def command(
    common: Common,
    guest: str,
    host: str,
    wait: bool,
    bandwidth: int | None,
    downtime_limit: int | None,
    switch_deadline: float | None,
    timeout: float | None,
    fast: bool,
    keep_source_disks: bool,
    dry_run: bool,
    request_id: str | None,
) -> None:
    """Move a running guest to another host.

    GUEST is a name or a UUID. Without --wait it returns once the migration has been accepted (status 0); with it,
    status 0 means that the guest runs on HOST, and 1 that the move was undone and the guest is where it was.
    TIME is in seconds, or a number with ms, s, m or h.
    """
    options = migration_options(bandwidth, downtime_limit, switch_deadline, timeout)
    options.fast, options.keep_source_disks = fast, keep_source_disks
    request = CreateMigrationRequest(
        guest=guest,
        destination_host=host,
        options=options,
        request_id=request_id or new_request_id(now()),
        validate_only=dry_run,
    )
    accepted = False

    async def work(controllers: Controllers) -> Exit:
        nonlocal accepted
        try:
            migration = await controllers.create(request)
        except DeadlineError as error:
            raise DeadlineError(f"{error.message}. {_unknown(request)}") from error
        if dry_run:
            print_answer(common, migration, lambda: plan_view(migration))
            return Exit.OK
        accepted = True
        if wait:
            return await follow(controllers, migration.id, common.output, last_only=True)
        print_answer(common, migration, lambda: started_sentence(migration))
        return print_result(migration, common.output) if is_final(migration) else Exit.OK

    def interrupted() -> None:
        say_note(
            f"migration {request.request_id} goes on. See it with `handoff watch {request.request_id}`, "
            f"undo it with `handoff cancel {request.request_id}`"
            if accepted
            else _unknown(request)
        )

    run(common, work, interrupted)


def migration_options(
    bandwidth: int | None, downtime_limit_ms: int | None, switch_deadline_s: float | None, timeout_s: float | None
) -> MigrationOptions:
    """The API's options; None stands for the default."""
    options = MigrationOptions(bandwidth_bytes_per_s=bandwidth or 0, downtime_limit_ms=downtime_limit_ms or 0)
    if switch_deadline_s is not None:
        options.switch_deadline.FromTimedelta(timedelta(seconds=switch_deadline_s))
    if timeout_s is not None:
        options.timeout.FromTimedelta(timedelta(seconds=timeout_s))
    return options


def _unknown(request: CreateMigrationRequest) -> str:
    return (
        f"If it was started, it is migration {request.request_id}: `handoff show {request.request_id}` tells; "
        f"it is safe to repeat the command with --request-id {request.request_id}"
    )
