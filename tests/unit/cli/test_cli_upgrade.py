"""`handoff upgrade --host`, `rollouts` and `rollout` as a user or a script runs them."""

import asyncio
import json

import pytest
from cli_samples import FAILED, PENDING, UPGRADED, UPGRADING, a_rollout
from click.testing import CliRunner
from conftest import Handoff, StartController
from fake_controller import FakeController, Fleet

from handoff.controller.v1.rollouts_pb2 import Rollout, RolloutState
from handoff_cli.exits import Exit
from handoff_cli.main import cli
from handoff_common.errors import PreconditionError

ID = "20260314-093106-77aa"
FIRST, SECOND, LAST = (UPGRADING, PENDING, PENDING), (UPGRADED, UPGRADING, UPGRADING), (UPGRADED, UPGRADED, UPGRADED)
DONE = a_rollout(LAST, state=RolloutState.ROLLOUT_STATE_DONE)
FAILING = a_rollout(
    (UPGRADED, FAILED, PENDING), state=RolloutState.ROLLOUT_STATE_FAILED, reason="web-1 failed: its QEMU ended"
)


async def play(fleet: Fleet, *records: Rollout) -> None:
    """Takes the rollout that the command has created through these records."""
    async with asyncio.timeout(20), fleet.changed:
        await fleet.changed.wait_for(lambda: ID in fleet.rollouts)
    for record in records:
        await asyncio.sleep(0.1)
        await fleet.put_rollout(record)


@pytest.mark.parametrize(
    "arguments",
    [
        ["upgrade"],
        ["upgrade", "web-1", "--host", "h1"],
        ["upgrade", "web-1", "--parallel", "2"],
        ["upgrade", "web-1", "--keep-going"],
        ["upgrade", "--host", "h1", "--parallel", "17"],
        ["rollout"],
    ],
)
def test_a_wrong_command_line_ends_with_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli, arguments).exit_code == Exit.USAGE


async def test_it_returns_once_it_is_accepted(handoff: Handoff, controller: FakeController) -> None:
    ended = await handoff(
        *("upgrade", "--host", "h1", "--to", "10.0-rebuilt", "--parallel", "3", "--keep-going"),
        *("--downtime-limit", "150", "--controller", controller.address),
    )
    assert (ended.status, ended.err) == (Exit.OK, "")
    (request,) = controller.created_rollouts
    assert (request.host, request.release, request.parallel, request.keep_going) == ("h1", "10.0-rebuilt", 3, True)
    assert request.options.downtime_limit_ms == 150
    assert f"`handoff rollout {request.request_id} --watch`" in ended.out


async def test_without_options_the_controller_chooses(handoff: Handoff, controller: FakeController) -> None:
    await handoff("upgrade", "--host", "h1", "--controller", controller.address)
    (request,) = controller.created_rollouts
    assert (request.release, request.parallel, request.keep_going) == ("", 0, False)
    assert not request.options.ListFields()


async def test_a_refusal_is_told(handoff: Handoff, controller: FakeController) -> None:
    controller.refusals.append(PreconditionError("rollout r0 is at work on h1: wait for it, or cancel it"))
    ended = await handoff("upgrade", "--host", "h1", "--controller", controller.address)
    assert (ended.status, ended.out) == (Exit.REFUSED, "")
    assert ended.err == "error: rollout r0 is at work on h1: wait for it, or cancel it\n"


@pytest.mark.parametrize(("last", "status"), [(DONE, Exit.OK), (FAILING, Exit.ABORTED)], ids=["done", "failed"])
async def test_wait_prints_a_line_a_step(
    handoff: Handoff, fleet: Fleet, controller: FakeController, last: Rollout, status: Exit
) -> None:
    playing = asyncio.create_task(play(fleet, a_rollout(FIRST), a_rollout(SECOND), last))
    ended = await handoff(
        *("upgrade", "--host", "h1", "--wait", "--request-id", ID, "--controller", controller.address)
    )
    await playing
    assert ended.status == status
    steps = [line.split()[1:3] for line in ended.out.splitlines() if ID in line]
    assert ["db-1", "upgraded"] in steps
    assert "\x1b" not in ended.out
    if status is Exit.OK:
        assert ended.out.splitlines()[-1] == "h1 is through with QEMU build 10.0-rebuilt: 3 upgraded."
    else:
        assert ended.err == (
            f"error: rollout {ID} of h1 failed: web-1 failed: its QEMU ended. 1 upgraded, 1 failed, 1 pending. "
            f"Details: `handoff rollout {ID}`\n"
        )


async def test_wait_with_json_prints_the_final_record(
    handoff: Handoff, fleet: Fleet, controller: FakeController
) -> None:
    playing = asyncio.create_task(play(fleet, a_rollout(SECOND), DONE))
    ended = await handoff(
        *("upgrade", "--host", "h1", "--wait", "--request-id", ID, "-o", "json", "--controller", controller.address)
    )
    await playing
    document = json.loads(ended.out)
    assert (ended.status, document["state"], len(document["guests"])) == (Exit.OK, "ROLLOUT_STATE_DONE", 3)


async def test_an_unanswered_create_is_not_done_twice(impatient: Handoff, start_controller: StartController) -> None:
    first, second = await start_controller(), await start_controller()
    first.drop_answers = 1
    ended = await impatient(
        *("upgrade", "--host", "h1", "--deadline", "20s", "--controller", f"{first.address},{second.address}")
    )
    assert ended.status == Exit.OK
    assert len(first.created_rollouts) == 1
    assert second.created_rollouts == []


async def test_rollouts_lists_them(handoff: Handoff, fleet: Fleet, controller: FakeController) -> None:
    await fleet.put_rollout(a_rollout())
    await fleet.put_rollout(a_rollout(LAST, id="20260101-000000-0000", host="h2", state=DONE.state))
    at = ("--controller", controller.address)
    listed = await handoff("rollouts", *at)
    assert listed.status == Exit.OK
    assert ID in listed.out
    assert "1 upgraded, 1" in listed.out
    assert "h2" not in (await handoff("rollouts", "--host", "h1", *at)).out
    active = json.loads((await handoff("rollouts", "--active", "-o", "json", *at)).out)
    assert [each["id"] for each in active["rollouts"]] == [ID]


async def test_rollout_shows_one(handoff: Handoff, fleet: Fleet, controller: FakeController) -> None:
    await fleet.put_rollout(FAILING)
    at = ("--controller", controller.address)
    shown = await handoff("rollout", ID[:11], *at)
    assert (shown.status, shown.err) == (Exit.OK, "")
    for part in ("FAILED", "web-1 failed: its QEMU ended", f"{ID}-g1", "pending"):
        assert part in shown.out
    assert json.loads((await handoff("rollout", ID, "-o", "json", *at)).out)["host"] == "h1"
    assert (await handoff("rollout", "2027", *at)).status == Exit.NOT_FOUND


async def test_rollout_cancel(handoff: Handoff, fleet: Fleet, controller: FakeController) -> None:
    await fleet.put_rollout(a_rollout())
    ended = await handoff("rollout", ID, "--cancel", "--controller", controller.address)
    assert ended.status == Exit.OK
    assert "begins no more guests" in ended.out
    assert fleet.rollouts[ID].cancel_requested


async def test_watch_survives_the_death_of_its_controller(
    handoff: Handoff, fleet: Fleet, start_controller: StartController
) -> None:
    first, second = await start_controller(), await start_controller()
    await fleet.put_rollout(a_rollout(FIRST))
    process = await handoff.start("rollout", ID, "--watch", "--controller", f"{first.address},{second.address}")
    async with asyncio.timeout(20):
        await first.watched.wait()
    await first.stop()
    await fleet.put_rollout(DONE)
    ended = await handoff.end(process)
    assert ended.status == Exit.OK
    assert "h1 is through" in ended.out


async def test_ctrl_c_lets_it_go_on(handoff: Handoff, fleet: Fleet, controller: FakeController) -> None:
    await fleet.put_rollout(a_rollout(FIRST))
    process = await handoff.start("rollout", ID, "--watch", "--controller", controller.address)
    async with asyncio.timeout(20):
        await controller.watched.wait()
    ended = await handoff.interrupt(process)
    assert ended.status == 130
    assert "it goes on" in ended.err
