"""The command as a user or a script runs it: in a process of its own."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
from cli_samples import PLANNED, PREPARING, UNDONE, WHOLE_WAY, a_guest, a_host, a_migration, copying
from click.testing import CliRunner
from conftest import Ended, Handoff, StartController
from fake_controller import FakeController, Fleet

from handoff.controller.v1.migrations_pb2 import GuestLoss
from handoff_cli import run
from handoff_cli.exits import EXIT_HELP, Exit
from handoff_cli.main import COMMANDS, cli
from handoff_common.errors import (
    ConflictError,
    ExhaustedError,
    HandoffError,
    HostDownError,
    InvalidArgumentError,
    NotFoundError,
    PreconditionError,
    StaleTermError,
    UnavailableError,
)

ID = "20260314-092653-5d3a"


async def play(fleet: Fleet, migration_id: str, *states: tuple["object", ...], pause_s: float = 0.1) -> None:
    """Takes the migration that the command has created through these records."""
    async with asyncio.timeout(20), fleet.changed:
        await fleet.changed.wait_for(lambda: migration_id in fleet.migrations)
    for record in states:
        await asyncio.sleep(pause_s)
        migration = record if not isinstance(record, tuple) else a_migration(record)
        migration.id = migration_id
        await fleet.put(migration)


async def migrate(
    handoff: Handoff, fleet: Fleet, controller: FakeController, *records: object, options: tuple[str, ...] = ()
) -> Ended:
    """`handoff migrate --wait` of a migration that goes through these records."""
    running = asyncio.create_task(play(fleet, ID, *records))
    ended = await handoff(
        "migrate", "web-1", "--to", "h2", "--wait", "--request-id", ID, "--controller", controller.address, *options
    )
    await running
    return ended


def test_help_comes_without_grpc() -> None:
    import subprocess

    code = (
        "import sys, handoff_cli.main; print(sorted({'grpc', 'google.protobuf', 'rich', 'asyncio'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "[]"


def test_help_names_every_command_and_exit_status() -> None:
    shown = CliRunner().invoke(cli, ["--help"])
    assert shown.exit_code == 0
    for name, what in COMMANDS.items():
        assert f"  {name}" in shown.output
        assert what in shown.output
        command_help = CliRunner().invoke(cli, [name, "--help"])
        assert command_help.exit_code == 0
        assert what in command_help.output
        assert "--controller" in command_help.output
        assert "--output" in command_help.output
    documented = (Path(__file__).parents[3] / "docs" / "cli.md").read_text()
    for status in Exit:
        assert f"{status:5}  " in EXIT_HELP
        assert f"| {status} |" in documented


@pytest.mark.parametrize(
    "arguments",
    [
        ["migrate", "web-1"],
        ["migrate", "web-1", "--to", "h2", "--bandwidth", "100M"],
        ["migrate", "web-1", "--to", "h2", "--downtime-limit", "0"],
        ["migrate", "web-1", "--to", "h2", "--timeout", "soon"],
        ["migrate", "web-1", "--to", "h2", "--request-id", "no spaces"],
        ["show"],
        ["move", "web-1"],
        ["list", "-o", "yaml"],
    ],
)
def test_a_wrong_command_line_ends_with_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli, arguments).exit_code == Exit.USAGE


async def test_without_a_controller_it_says_how_to_set_one(handoff: Handoff) -> None:
    ended = await handoff("hosts")
    assert ended.status == Exit.USAGE
    for way in ("--controller", "HANDOFF_CONTROLLER", f"{handoff.home}/.config/handoff/cli.toml", "/etc/handoff/cli"):
        assert way in ended.err
    assert ended.err.count("\n") == 1


async def test_controllers_from_a_file_the_environment_and_the_option(
    handoff: Handoff, fleet: Fleet, controller: FakeController, nobody: str
) -> None:
    fleet.hosts.append(a_host())
    file = handoff.home / ".config" / "handoff" / "cli.toml"
    file.parent.mkdir(parents=True)
    file.write_text(f'controllers = ["{nobody}", "{controller.address}"]\n')
    assert (await handoff("hosts")).status == Exit.OK
    handoff.environment["HANDOFF_CONTROLLER"] = nobody
    assert (await handoff("hosts")).status == Exit.UNAVAILABLE
    assert (await handoff("hosts", "--controller", controller.address)).status == Exit.OK
    assert (await handoff("--controller", controller.address, "hosts")).status == Exit.OK
    assert (await handoff("--controller", controller.address, "hosts", "--controller", nobody)).status == 5
    del handoff.environment["HANDOFF_CONTROLLER"]
    file.write_text("controler = []\n")
    ended = await handoff("hosts")
    assert ended.status == Exit.USAGE
    assert str(file) in ended.err


async def test_a_controller_on_a_unix_socket(
    handoff: Handoff, fleet: Fleet, start_controller: StartController, tmp_path: Path
) -> None:
    fleet.guests.append(a_guest())
    await start_controller(f"unix:{tmp_path}/controller.sock")
    ended = await handoff("guests", "--controller", f"unix:{tmp_path}/controller.sock")
    assert ended.status == Exit.OK
    assert "web-1" in ended.out


@pytest.mark.parametrize("address", ["h1", "h1:", "h1:0", "h1:99999", "unix:relative", ":7700", ","])
async def test_what_can_be_no_address_is_refused(handoff: Handoff, address: str) -> None:
    ended = await handoff("hosts", "--controller", address)
    assert ended.status == Exit.USAGE
    assert "HOST:PORT" in ended.err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidArgumentError("web-1 is on h2 already; name another host"), Exit.USAGE),
        (NotFoundError("no guest 'web-1'; `handoff guests` lists them"), Exit.NOT_FOUND),
        (PreconditionError("web-1 can't move: a CD-ROM of this host is in its drive; eject it"), Exit.REFUSED),
        (ExhaustedError("h2 has 1 GiB free, web-1 needs 4 GiB; choose another host"), Exit.EXHAUSTED),
        (HostDownError("can't move web-1 to h2: agent of h2 (10.0.0.2:7701): connection refused"), Exit.UNAVAILABLE),
        (HandoffError("KeyError: 'x'"), Exit.INTERNAL),
    ],
)
async def test_each_refusal_has_its_status_and_its_sentence(
    error: HandoffError, status: Exit, handoff: Handoff, controller: FakeController
) -> None:
    controller.refusals.append(error)
    ended = await handoff("migrate", "web-1", "--to", "h2", "--controller", controller.address)
    assert (ended.status, ended.out) == (status, "")
    assert ended.err == f"error: {error.message}\n"


async def test_a_lasting_unavailability_is_told_at_once_and_ends_with_5(
    handoff: Handoff, controller: FakeController
) -> None:
    controller.refusals += [UnavailableError("no controller leads at the moment")] * 20
    ended = await handoff("migrate", "web-1", "--to", "h2", "--deadline", "1.2s", "--controller", controller.address)
    assert ended.status == Exit.UNAVAILABLE
    note, error = ended.err.splitlines()
    assert note.startswith("note: ")
    assert note.endswith("no controller leads at the moment; trying again")
    assert error.startswith("error: ")


def test_every_error_has_a_status() -> None:
    for kind in (StaleTermError, ConflictError):
        assert run.status_of(kind("")) in set(Exit)
    assert run.status_of(StaleTermError("")) is Exit.REFUSED


async def test_migrate_returns_once_it_is_accepted(handoff: Handoff, controller: FakeController) -> None:
    ended = await handoff(
        "migrate",
        "web-1",
        "--to",
        "h2",
        *("--bandwidth", "1gbit", "--downtime-limit", "150", "--switch-deadline", "1.5", "--timeout", "10m"),
        *("--controller", controller.address),
    )
    assert ended.status == Exit.OK
    request = controller.created[0]
    assert (request.guest, request.destination_host) == ("web-1", "h2")
    assert request.options.bandwidth_bytes_per_s == 125_000_000
    assert request.options.downtime_limit_ms == 150
    assert request.options.switch_deadline.ToMilliseconds() == 1500
    assert request.options.timeout.ToSeconds() == 600
    assert f"`handoff watch {request.request_id}`" in ended.out


async def test_without_options_the_controller_chooses(handoff: Handoff, controller: FakeController) -> None:
    await handoff("migrate", "web-1", "--to", "h2", "--controller", controller.address)
    options = controller.created[0].options
    assert not options.ListFields()


async def test_repeating_a_request_that_was_undone_is_no_success(
    handoff: Handoff, fleet: Fleet, controller: FakeController
) -> None:
    await fleet.put(a_migration(UNDONE))
    ended = await handoff("migrate", "web-1", "--to", "h2", "--request-id", ID, "--controller", controller.address)
    assert ended.status == Exit.ABORTED
    assert "was undone" in ended.err


async def test_wait_prints_lines_to_a_pipe_and_ends_with_0(
    handoff: Handoff, fleet: Fleet, controller: FakeController
) -> None:
    ended = await migrate(handoff, fleet, controller, (PLANNED, PREPARING), copying(0.2), copying(0.8), WHOLE_WAY)
    assert (ended.status, ended.err) == (Exit.OK, "")
    lines = ended.out.splitlines()
    assert "\x1b" not in ended.out
    assert [line.split()[1] for line in lines if "MiB/s" not in line][:-1] == (
        ["PLANNED", "PREPARING", "COPYING", "SWITCHING", "COMMITTED", "FINISHING", "DONE"]
    )
    assert lines[-1].startswith("web-1 runs on h2: took 15.6 s, guest paused for 84 ms")


async def test_wait_ends_with_1_when_it_was_undone(handoff: Handoff, fleet: Fleet, controller: FakeController) -> None:
    ended = await migrate(handoff, fleet, controller, copying(0.2), UNDONE)
    assert ended.status == Exit.ABORTED
    assert ended.err == (
        f"error: migration {ID} was undone: cancelled by the operator while COPYING. web-1 is on h1 as before. "
        f"Details: `handoff show {ID}`\n"
    )


async def test_done_with_warnings_is_a_success_that_prints_them(
    handoff: Handoff, fleet: Fleet, controller: FakeController
) -> None:
    ended = await migrate(handoff, fleet, controller, a_migration(warnings=["release on h1 has not been done"]))
    assert ended.status == Exit.OK
    assert ended.err == "warning: release on h1 has not been done\n"


async def test_wait_with_json_prints_one_document_the_final_record(
    handoff: Handoff, fleet: Fleet, controller: FakeController
) -> None:
    ended = await migrate(handoff, fleet, controller, copying(0.2), WHOLE_WAY, options=("-o", "json"))
    assert (ended.status, ended.err) == (Exit.OK, "")
    document = json.loads(ended.out)
    assert document["state"] == "MIGRATION_STATE_DONE"
    assert document["outcome"]["downtime_ms"] == 84.2
    assert document["guest_name"] == "web-1"


async def test_watch_with_json_prints_a_line_an_update(
    handoff: Handoff, fleet: Fleet, controller: FakeController
) -> None:
    await fleet.put(copying(0.2))
    process = await handoff.start("watch", ID[:8], "-o", "json", "--controller", controller.address)
    assert process.stdout is not None
    first = json.loads(await process.stdout.readline())
    assert first["progress"]["dirty_bytes_per_s"] == str(21 << 20)
    await fleet.put(a_migration())
    ended = await handoff.end(process)
    assert [json.loads(line)["state"] for line in ended.out.splitlines()] == ["MIGRATION_STATE_DONE"]
    assert ended.status == Exit.OK


async def test_wait_survives_the_death_of_its_controller(
    handoff: Handoff, fleet: Fleet, start_controller: StartController
) -> None:
    first, second = await start_controller(), await start_controller()

    async def die() -> None:
        await play(fleet, ID, copying(0.2))
        await first.watched.wait()
        await first.stop()
        await fleet.put(a_migration())

    dying = asyncio.create_task(die())
    ended = await handoff(
        *("migrate", "web-1", "--to", "h2", "--wait", "--request-id", ID),
        *("--controller", f"{first.address},{second.address}"),
    )
    await dying
    assert ended.status == Exit.OK
    assert "web-1 runs on h2" in ended.out


async def test_ctrl_c_detaches_and_says_that_the_migration_goes_on(
    handoff: Handoff, fleet: Fleet, controller: FakeController
) -> None:
    process = await handoff.start(
        "migrate", "web-1", "--to", "h2", "--wait", "--request-id", ID, "--controller", controller.address
    )
    assert process.stdout is not None
    assert b"PLANNED" in await process.stdout.readline()
    ended = await handoff.interrupt(process)
    assert ended.status == Exit.INTERRUPTED
    for said in ("goes on", f"`handoff watch {ID}`", f"`handoff cancel {ID}`"):
        assert said in ended.err
    assert "Traceback" not in ended.err
    assert not fleet.migrations[ID].cancel_requested


async def test_ctrl_c_before_the_answer_leaves_the_id_to_ask_for(
    handoff: Handoff, fleet: Fleet, controller: FakeController
) -> None:
    controller.drop_answers = 1
    process = await handoff.start(
        "migrate", "web-1", "--to", "h2", "--request-id", ID, "--controller", controller.address
    )
    async with asyncio.timeout(20), fleet.changed:
        await fleet.changed.wait_for(lambda: ID in fleet.migrations)
    ended = await handoff.interrupt(process)
    assert ended.status == Exit.INTERRUPTED
    assert f"--request-id {ID}" in ended.err


async def test_cancel_records_the_wish(handoff: Handoff, fleet: Fleet, controller: FakeController) -> None:
    await fleet.put(copying(0.5))
    ended = await handoff("cancel", ID, "--controller", controller.address)
    assert ended.status == Exit.OK
    assert fleet.migrations[ID].cancel_requested
    assert "web-1 stays on h1" in ended.out


async def test_cancel_that_comes_too_late(handoff: Handoff, controller: FakeController) -> None:
    controller.refusals.append(PreconditionError("web-1 already belongs to h2. To bring it back, migrate it to h1"))
    ended = await handoff("cancel", ID, "--controller", controller.address)
    assert ended.status == Exit.REFUSED
    assert "To bring it back, migrate it to h1" in ended.err


async def test_a_decision_carries_who_takes_it(handoff: Handoff, fleet: Fleet, controller: FakeController) -> None:
    await fleet.put(a_migration(WHOLE_WAY[:5]))
    ended = await handoff("recover", ID, "--to", "source", "--i-have-fenced", "h2", "--controller", controller.address)
    assert ended.status == Exit.OK, ended
    taken = fleet.migrations[ID].recovery
    assert (taken.target, taken.fenced_host) == (1, "h2")
    assert "@" in taken.by
    assert "web-1 runs on h1" in ended.out


async def test_an_unsafe_decision_is_refused(handoff: Handoff, controller: FakeController) -> None:
    controller.refusals.append(PreconditionError("h2 is not off: its agent answers"))
    ended = await handoff("recover", ID, "--to", "source", "--controller", controller.address)
    assert ended.status == Exit.REFUSED
    assert "h2 is not off" in ended.err


async def test_a_lost_guest_is_status_1(handoff: Handoff, fleet: Fleet, controller: FakeController) -> None:
    loss = GuestLoss(host="h2", reason="web-1 ran on h2, and its QEMU ended there", certain=True)
    await fleet.put(a_migration(loss=loss))
    ended = await handoff("watch", ID, "--controller", controller.address)
    assert ended.status == Exit.ABORTED
    assert "web-1 is lost: web-1 ran on h2" in ended.err


@pytest.mark.parametrize("name", ["hosts", "guests", "list"])
async def test_lists_as_json_are_the_apis_messages(
    name: str, handoff: Handoff, fleet: Fleet, controller: FakeController
) -> None:
    fleet.hosts.append(a_host())
    fleet.guests.append(a_guest())
    await fleet.put(a_migration())
    ended = await handoff(name, "-o", "json", "--controller", controller.address)
    assert ended.status == Exit.OK
    (members,) = json.loads(ended.out).values()
    assert len(members) == 1


async def test_a_pipe_gets_one_line_each_however_long(
    handoff: Handoff, fleet: Fleet, controller: FakeController
) -> None:
    fleet.guests += [a_guest("a-guest-with-quite-a-long-name" * 4), a_guest("db")]
    ended = await handoff("guests", "--controller", controller.address)
    assert len(ended.out.splitlines()) == 3


async def test_show(handoff: Handoff, fleet: Fleet, controller: FakeController) -> None:
    await fleet.put(a_migration())
    ended = await handoff("show", ID[:10], "--controller", controller.address)
    assert ended.status == Exit.OK
    assert "held → committed     9.1 ms" in ended.out
    assert (await handoff("show", "2025", "--controller", controller.address)).status == Exit.NOT_FOUND


async def test_a_proxy_for_the_web_is_not_asked(handoff: Handoff, controller: FakeController, nobody: str) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        handoff.environment[name] = f"http://{nobody}"
    assert (await handoff("hosts", "--controller", controller.address)).status == Exit.OK


async def test_a_frozen_controller_does_not_hang_the_command(
    handoff: Handoff, fleet: Fleet, controller: FakeController, frozen: str
) -> None:
    fleet.hosts.append(a_host())
    async with asyncio.timeout(10):
        assert (await handoff("hosts", "--controller", f"{frozen},{controller.address}")).status == Exit.OK
        ended = await handoff("hosts", "--controller", frozen)
    assert ended.status == Exit.UNAVAILABLE
    assert frozen in ended.err
