import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from fake_controller import FakeController, Fleet

HANDOFF = (str(Path(sys.executable).parent / "handoff"),)
IMPATIENT = (sys.executable, "-c", "from handoff_cli import failover, main; failover.WRITE_S = 1.0; main.main()")


@dataclass(frozen=True)
class Ended:
    """What a run of the command left."""

    status: int
    out: str
    err: str


class Handoff:
    """The real command, in a process of its own, with an empty home."""

    def __init__(self, home: Path, program: tuple[str, ...] = HANDOFF) -> None:
        self.home = home
        self.program = program
        self.environment = {"HOME": str(home), "PATH": os.environ["PATH"], "TZ": "UTC", "LC_ALL": "C.UTF-8"}

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            # A shell's background jobs, of which the test run may be one, ignore SIGINT, and so do their children.
            # Not by a preexec_fn: that takes a real fork, which gRPC's threads in this process do not survive.
            "env",
            "--default-signal=INT",
            *self.program,
            *arguments,
            env=self.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def __call__(self, *arguments: str) -> Ended:
        return await self.end(await self.start(*arguments))

    async def end(self, process: asyncio.subprocess.Process) -> Ended:
        async with asyncio.timeout(60):
            out, err = await process.communicate()
        assert process.returncode is not None
        return Ended(process.returncode, out.decode(), err.decode())

    async def interrupt(self, process: asyncio.subprocess.Process) -> Ended:
        process.send_signal(signal.SIGINT)
        return await self.end(process)


@pytest.fixture
def handoff(tmp_path: Path) -> Handoff:
    return Handoff(tmp_path)


@pytest.fixture
def impatient(tmp_path: Path) -> Handoff:
    """The same, but a controller has a second to answer a write, not fifteen."""
    return Handoff(tmp_path, IMPATIENT)


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


StartController = Callable[..., Awaitable[FakeController]]


@pytest_asyncio.fixture
async def start_controller(fleet: Fleet) -> AsyncIterator[StartController]:
    started: list[FakeController] = []

    async def start(address: str = "127.0.0.1:0") -> FakeController:
        started.append(await FakeController(fleet).start(address))
        return started[-1]

    yield start
    for controller in started:
        await controller.stop()


@pytest_asyncio.fixture
async def controller(start_controller: StartController) -> FakeController:
    return await start_controller()


@pytest.fixture
def frozen() -> Iterator[str]:
    """Address of a controller that is stopped: the kernel accepts connections, nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def nobody() -> str:
    """An address that refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    return f"127.0.0.1:{port}"
