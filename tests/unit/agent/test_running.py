"""Asking running QEMUs for their release: once each, and never waiting for one that hangs."""

import asyncio
import time
from typing import cast

import pytest

from handoff_agent import running
from handoff_agent.running import Process, RunningReleases
from handoff_agent.slots import Slot
from handoff_common.errors import DeadlineError, HandoffError, UnavailableError

WEB, DB = Process("a", "web", 1), Process("a", "db", 2)


class FakeSlot:
    name = "a"


class FakeMonitor:
    asked: list[str]
    answers: dict[str, tuple[int, int, int] | HandoffError | None]

    def __init__(self, slot: Slot, uuid: str) -> None:
        self._uuid = uuid

    async def query_release(self) -> tuple[int, int, int]:
        FakeMonitor.asked.append(self._uuid)
        answer = FakeMonitor.answers[self._uuid]
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, HandoffError):
            raise answer
        assert answer is not None
        return answer


@pytest.fixture
def slot(monkeypatch: pytest.MonkeyPatch) -> Slot:
    monkeypatch.setattr(running, "Monitor", FakeMonitor)
    monkeypatch.setattr(running, "PATIENCE_S", 0.1)
    FakeMonitor.asked = []
    FakeMonitor.answers = {"web": (10, 0, 2), "db": (7, 2, 22)}
    return cast(Slot, FakeSlot())


async def test_each_start_is_asked_once(slot: Slot) -> None:
    releases = RunningReleases()
    for _ in range(2):
        await releases.ask(slot, {WEB, DB})
    assert (releases.of(WEB), releases.of(DB)) == ("10.0.2", "7.2.22")
    assert sorted(FakeMonitor.asked) == ["db", "web"]
    again = Process("a", "web", 3)
    releases.keep("a", {again, DB})
    assert releases.of(WEB) == ""
    await releases.ask(slot, {again, DB})
    assert FakeMonitor.asked.count("web") == 2


async def test_one_that_hangs_holds_nobody_up(slot: Slot) -> None:
    FakeMonitor.answers["web"] = None
    releases = RunningReleases()
    began = time.monotonic()
    await releases.ask(slot, [WEB])
    await releases.ask(slot, [WEB])
    assert time.monotonic() - began < 5
    assert releases.of(WEB) == ""
    assert FakeMonitor.asked == ["web"]
    await releases.close()


async def test_who_did_not_answer_is_left_alone_who_could_not_be_asked_is_asked_again(slot: Slot) -> None:
    FakeMonitor.answers = {"web": DeadlineError("frozen"), "db": UnavailableError("libvirtd is restarted")}
    releases = RunningReleases()
    for _ in range(2):
        await releases.ask(slot, [WEB, DB])
    assert FakeMonitor.asked.count("web") == 1
    assert FakeMonitor.asked.count("db") == 2
