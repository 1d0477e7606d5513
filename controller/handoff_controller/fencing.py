"""Makes sure that a host runs no guest any more, by the command that the operator has configured for it."""

import asyncio
import contextlib
import os
import signal
from typing import Protocol

import structlog

from handoff_common.errors import PreconditionError
from handoff_controller.settings import FencingSettings

log = structlog.get_logger()

HOST = "{host}"
LONGEST_OUTPUT = 300


class Fencing(Protocol):
    """What can be done about a host that does not answer."""

    @property
    def configured(self) -> bool:
        """There is a command."""

    @property
    def automatic_after_s(self) -> float:
        """How long a decision may stand out before the host is fenced without being asked; 0: for ever."""

    async def fence(self, host: str) -> str:
        """Fences it and says how, in a sentence. Raises PreconditionError when it is not certain that it is off."""


class FenceCommand:
    """A command such as a fence agent's: run for a host, it ends with status 0 only when that host is off."""

    def __init__(self, settings: FencingSettings) -> None:
        self._settings = settings

    @property
    def configured(self) -> bool:
        """There is a command."""
        return bool(self._settings.command)

    @property
    def automatic_after_s(self) -> float:
        """How long a decision may stand out before the host is fenced without being asked; 0: for ever."""
        return self._settings.automatic_after_s if self.configured else 0.0

    async def fence(self, host: str) -> str:
        """Runs it to its end. Raises PreconditionError when it fails or takes too long."""
        if not self.configured:
            raise PreconditionError("no fence command is configured (fencing.command of the controllers)")
        command = [word.replace(HOST, host) for word in self._settings.command]
        log.warning("fencing a host", host=host, command=command)
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise PreconditionError(f"{host} is not fenced: {command[0]}: {error.strerror}") from error
        try:
            async with asyncio.timeout(self._settings.deadline_s):
                output, _ = await process.communicate()
        except TimeoutError:
            raise PreconditionError(
                f"{host} is not fenced: {command[0]} has not ended within {self._settings.deadline_s:g} s"
            ) from None
        finally:
            # Also what it has left behind: nothing of it may come to act on the host later.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if process.returncode != 0:
            said = output.decode(errors="replace").strip()[-LONGEST_OUTPUT:]
            raise PreconditionError(
                f"{host} is not fenced: {command[0]} ended with status {process.returncode}: {said or 'without a word'}"
            )
        log.warning("a host is fenced", host=host)
        return f"{host} was fenced by {command[0]}"
