"""The fence command, as real processes."""

import sys
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from handoff_common.errors import PreconditionError
from handoff_controller.fencing import FenceCommand
from handoff_controller.settings import FencingSettings


def fence(script: str, deadline_s: float = 10.0) -> FenceCommand:
    return FenceCommand(FencingSettings(command=("/bin/sh", "-c", script, "fence", "{host}"), deadline_s=deadline_s))


async def test_the_host_is_named_to_the_command(tmp_path: Path) -> None:
    how = await fence(f"echo $1 > {tmp_path}/asked").fence("h2")

    assert (tmp_path / "asked").read_text() == "h2\n"
    assert how == "h2 was fenced by /bin/sh"


async def test_a_name_is_never_read_by_a_shell(tmp_path: Path) -> None:
    command = FenceCommand(
        FencingSettings(command=(sys.executable, "-c", "import sys; sys.exit(sys.argv[1])", "{host}"))
    )

    with pytest.raises(PreconditionError, match=r"\$\(reboot\); h2"):
        await command.fence("$(reboot); h2")


async def test_a_failure_is_told_with_its_own_words() -> None:
    with pytest.raises(PreconditionError, match="h2 is not fenced: /bin/sh ended with status 3: no such plug"):
        await fence("echo no such plug >&2; exit 3").fence("h2")


async def test_one_that_hangs_is_ended_with_all_that_it_began(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(PreconditionError, match=r"has not ended within 0\.3 s"):
        await fence(f"(sleep 1; touch {tmp_path}/later) & sleep 60", deadline_s=0.3).fence("h2")

    assert time.monotonic() - began < 5
    time.sleep(1.2)  # noqa: ASYNC251 - what must not happen has no event
    assert not (tmp_path / "later").exists()


async def test_one_that_is_not_there() -> None:
    with pytest.raises(PreconditionError, match="No such file"):
        await FenceCommand(FencingSettings(command=("/nowhere/fence", "{host}"))).fence("h2")


async def test_without_a_command_nothing_is_fenced() -> None:
    command = FenceCommand(FencingSettings(automatic_after_s=5))

    assert (command.configured, command.automatic_after_s) == (False, 0.0)
    with pytest.raises(PreconditionError, match=r"fencing\.command"):
        await command.fence("h2")


@pytest.mark.parametrize("command", [("/sbin/reboot",), ("/sbin/fence", "--ip", "h1-ipmi")])
def test_a_command_that_is_not_told_which_host_is_refused(command: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError, match="it can't know what to turn off"):
        FencingSettings(command=command)
