"""A slot against a real libvirtd that freezes, thaws and dies while calls are under way."""

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import libvirt
import pytest
from libvirtds import running_libvirtd

from handoff_agent import slots
from handoff_agent.events import ConnectionEvent
from handoff_agent.slots import Slot
from handoff_common.errors import DeadlineError, HandoffError, UnavailableError

CALLERS = 8


class Daemon:
    """A libvirtd of its own, and a slot for it whose keep-alive gives up after 2 s."""

    def __init__(self, uri: str, root: Path) -> None:
        self.slot = Slot("a", uri)
        self.pid = int(subprocess.check_output(["pgrep", "-f", f"^libvirtd -p {root}/run/libvirtd.pid"]))
        self.answers: asyncio.Queue[int] = asyncio.Queue()

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    async def ask(self, timeout_s: float, *, urgent: bool = False) -> int:
        return await self.slot.call(libvirt.virConnect.getLibVersion, timeout_s, urgent=urgent)

    async def keep_asking(self, *, urgent: bool) -> None:
        while True:
            try:
                self.answers.put_nowait(await self.ask(1, urgent=urgent))
            except HandoffError:
                await asyncio.sleep(0.05)

    async def until_connected(self, *, connected: bool) -> None:
        with self.slot.events() as events:
            while self.slot.connected is not connected:
                event = await events.next()
                assert isinstance(event, ConnectionEvent)


@pytest.fixture
async def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Daemon]:
    monkeypatch.setattr(slots, "KEEPALIVE_INTERVAL_S", 1)
    monkeypatch.setattr(slots, "KEEPALIVE_COUNT", 1)
    with running_libvirtd(tmp_path) as uri:
        daemon = Daemon(uri, tmp_path)
        await daemon.slot.start()
        assert await daemon.slot.wait_connected(20)
        yield daemon
        await daemon.slot.close()
        with contextlib.suppress(ProcessLookupError):
            daemon.thaw()


async def test_calls_outlive_freezes_that_keep_alive_notices(daemon: Daemon) -> None:
    callers = [asyncio.create_task(daemon.keep_asking(urgent=bool(number % 2))) for number in range(CALLERS)]
    for _ in range(3):
        daemon.freeze()
        async with asyncio.timeout(10):
            await daemon.until_connected(connected=False)
        with pytest.raises(UnavailableError):
            await daemon.ask(1)
        daemon.thaw()
        async with asyncio.timeout(2):
            await daemon.until_connected(connected=True)
            daemon.answers = asyncio.Queue()
            for _ in callers:
                await daemon.answers.get()
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)


async def test_what_was_asked_in_a_freeze_is_answered_after_it(daemon: Daemon) -> None:
    daemon.freeze()
    with pytest.raises(DeadlineError):
        await daemon.ask(0.2, urgent=True)
    patient = asyncio.create_task(daemon.ask(20, urgent=True))
    async with asyncio.timeout(10):
        await daemon.until_connected(connected=False)
    assert not patient.done()
    daemon.thaw()
    assert await patient > 0


async def test_an_urgent_call_does_not_wait_behind_ordinary_ones(daemon: Daemon) -> None:
    over = threading.Event()
    waiting = [asyncio.create_task(daemon.slot.call(lambda _: over.wait(20))) for _ in range(CALLERS)]
    await asyncio.sleep(0)
    with pytest.raises(DeadlineError):
        await daemon.ask(0.2)
    assert await daemon.ask(5, urgent=True) > 0
    over.set()
    await asyncio.gather(*waiting)


async def test_a_libvirtd_that_dies_under_a_call_is_unavailable(daemon: Daemon) -> None:
    daemon.freeze()
    asked = asyncio.create_task(daemon.ask(10))
    await asyncio.sleep(0.2)
    os.kill(daemon.pid, signal.SIGKILL)
    with pytest.raises(UnavailableError):
        await asked
    async with asyncio.timeout(10):
        await daemon.until_connected(connected=False)
