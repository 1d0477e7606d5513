"""What goes with a guest is told of every step, in order, and can stop it: two real libvirtds, QEMU 10."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from builds import Builds
from one_host import CPR, UNIX, Upgrade, upgrading

from handoff.agent.v1 import qemu_pb2 as pb
from handoff_agent.companions import Companions, DestinationCompanion, SourceCompanion, each, together
from handoff_agent.handoff import Handoff, log
from handoff_agent.rules import (
    ABORTED,
    ACTIVE,
    DESTINATION,
    FAILED,
    FINALIZED,
    HELD,
    READY,
    RELEASED,
    SOURCE,
    SWITCHING,
    TRANSFERRING,
    Call,
    State,
)
from handoff_agent.slots import Slot
from handoff_common.errors import HandoffError, PreconditionError

METHODS = pytest.mark.parametrize("method", [UNIX, CPR], ids=["copy", "cpr"])


class Recorder(SourceCompanion, DestinationCompanion, Companions):
    """One companion for everything, that does as it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.fails: set[str] = set()
        """Each of these fails once."""
        self.hangs: set[str] = set()

    def of_source(self, handoff: Handoff, slot: Slot) -> Sequence[SourceCompanion]:
        return (self,)

    def of_destination(self, handoff: Handoff, slot: Slot) -> Sequence[DestinationCompanion]:
        return (self,)

    async def _note(self, what: str) -> None:
        self.said.append(what)
        if what in self.hangs:
            await asyncio.Event().wait()
        if what in self.fails:
            self.fails.discard(what)
            raise PreconditionError(f"{what} can't be done")

    async def begin(self) -> None:
        await self._note("begin")

    async def ordered(self) -> None:
        await self._note("ordered")

    async def paused(self) -> None:
        await self._note("paused")

    async def held_again(self) -> None:
        await self._note("held_again")

    async def back(self) -> None:
        await self._note("back")

    async def released(self) -> None:
        await self._note("released")

    async def prepare(self, xml: str) -> str:
        await self._note("prepare")
        return xml.replace("<devices>", "<devices><!-- prepared -->")

    async def created(self) -> None:
        await self._note("created")

    async def before_run(self) -> None:
        await self._note("before_run")

    async def running(self) -> None:
        await self._note("running")

    async def finalize(self) -> None:
        await self._note("finalize")

    async def undo(self) -> None:
        await self._note("undo")

    async def until(self, what: str) -> None:
        async with asyncio.timeout(20):
            while what not in self.said:  # noqa: ASYNC110 - the recorder is called, and knows nobody to tell
                await asyncio.sleep(0.01)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
async def upgrade(
    libvirtd: str, other_libvirtd: str, builds: Builds, tmp_path: Path, recorder: Recorder
) -> AsyncIterator[Upgrade]:
    async with upgrading((libvirtd, other_libvirtd), builds, tmp_path) as found:
        found.companions = recorder
        await found.restart()
        yield found


async def finish(upgrade: Upgrade) -> None:
    destination = upgrade.handoffs.destination(upgrade.id, Call.ACTIVATE)
    await destination.activate()
    assert destination.state == ACTIVE, destination.record.message
    source = upgrade.handoffs.source(upgrade.id, Call.RELEASE)
    await source.release()
    await destination.finalize()
    assert (source.state, destination.state) == (RELEASED, FINALIZED)
    await upgrade.is_only_in("b")


async def broken(upgrade: Upgrade) -> pb.Handoff:
    failed = await upgrade.until(FAILED)
    assert failed.state == FAILED
    assert await upgrade.status("a") == "running"
    return failed


@METHODS
async def test_all_steps_are_told_in_order(
    upgrade: Upgrade, recorder: Recorder, method: pb.TransferMethod.ValueType
) -> None:
    await upgrade.advance(method, HELD)
    assert recorder.said[-1] == "paused"
    await finish(upgrade)
    before = ["prepare", "created", "begin"] if method == UNIX else ["prepare", "begin", "created"]
    assert recorder.said == [*before, "ordered", "paused", "before_run", "running", "released", "finalize"]


@METHODS
async def test_what_must_follow_the_pause_is_waited_for(
    upgrade: Upgrade, recorder: Recorder, method: pb.TransferMethod.ValueType
) -> None:
    recorder.hangs = {"paused"}
    await upgrade.advance(method, SWITCHING)
    await recorder.until("paused")
    assert await upgrade.status("a") != "running"
    assert upgrade.handoffs.get(upgrade.id, SOURCE).state == SWITCHING
    failed = await broken(upgrade)
    assert "paused for more than 2 s" in failed.message
    assert "back" in recorder.said
    await upgrade.abort()
    await upgrade.is_only_in("a")


@METHODS
async def test_a_switch_is_broken_off_when_the_pause_can_not_be_followed(
    upgrade: Upgrade, recorder: Recorder, method: pb.TransferMethod.ValueType
) -> None:
    recorder.fails = {"paused"}
    await upgrade.advance(method, SWITCHING)
    assert "paused can't be done" in (await broken(upgrade)).message
    assert recorder.said.index("back") > recorder.said.index("paused")
    await upgrade.abort()
    await upgrade.is_only_in("a")
    upgrade.id += "-again"
    await upgrade.advance(method, HELD)
    await finish(upgrade)


@METHODS
@pytest.mark.parametrize("step", ["begin", "ordered"])
async def test_a_failure_before_the_pause_is_the_handoffs(
    upgrade: Upgrade, recorder: Recorder, method: pb.TransferMethod.ValueType, step: str
) -> None:
    recorder.fails = {step}
    goal = TRANSFERRING if step == "begin" else SWITCHING
    await upgrade.advance(method, goal)
    assert f"{step} can't be done" in (await broken(upgrade)).message
    assert "paused" not in recorder.said
    await upgrade.abort()
    await upgrade.is_only_in("a")


async def test_what_begins_is_cancelled_by_an_abort(upgrade: Upgrade, recorder: Recorder) -> None:
    recorder.hangs = {"begin"}
    await upgrade.advance(UNIX, TRANSFERRING)
    await recorder.until("begin")
    await asyncio.wait_for(upgrade.abort(), 5)
    assert recorder.said[-1] == "back"
    await upgrade.is_only_in("a")


async def test_a_restarted_agent_begins_again(upgrade: Upgrade, recorder: Recorder) -> None:
    recorder.hangs = {"begin"}
    await upgrade.advance(CPR, TRANSFERRING)
    await recorder.until("begin")
    recorder.hangs.clear()
    await upgrade.restart()
    assert (await upgrade.until(READY)).state == READY
    assert recorder.said.count("begin") == 2
    await upgrade.handoffs.source(upgrade.id, Call.SWITCH_OVER).switch_over()
    assert (await upgrade.until(HELD)).state == HELD
    await finish(upgrade)


@METHODS
async def test_an_agent_restarted_in_the_pause_goes_on(
    upgrade: Upgrade, recorder: Recorder, method: pb.TransferMethod.ValueType
) -> None:
    recorder.hangs = {"paused"}
    await upgrade.advance(method, SWITCHING)
    await recorder.until("paused")
    recorder.hangs.clear()
    await upgrade.restart()
    assert (await upgrade.until(HELD)).state == HELD
    assert recorder.said.count("paused") == 2
    await finish(upgrade)


@pytest.mark.parametrize("runs_again", [False, True], ids=["held", "runs-again"])
async def test_a_restarted_agent_holds_what_does_not_run_again(
    upgrade: Upgrade, recorder: Recorder, runs_again: bool
) -> None:
    """An abort runs the guest before it is on disk."""
    await upgrade.advance(CPR, HELD)
    if runs_again:
        recorder.fails = {"back"}
        with pytest.raises(HandoffError, match="back can't be done"):
            await upgrade.handoffs.abort(upgrade.id, SOURCE, "the test says so")
    await upgrade.restart()
    if not runs_again:
        await recorder.until("held_again")
    await upgrade.abort()
    assert ("held_again" in recorder.said) is not runs_again
    await upgrade.is_only_in("a")


@pytest.mark.parametrize("stage", [READY, HELD], ids=pb.HandoffState.Name)
async def test_what_could_not_be_turned_back_is_repeated(upgrade: Upgrade, recorder: Recorder, stage: State) -> None:
    await upgrade.advance(CPR, stage)
    recorder.fails = {"back", "undo"}
    for role, step in ((SOURCE, "back"), (DESTINATION, "undo")):
        with pytest.raises(HandoffError, match=f"{step} can't be done"):
            await upgrade.handoffs.abort(upgrade.id, role, "the test says so")
        assert upgrade.handoffs.get(upgrade.id, role).state != ABORTED
    assert await upgrade.status("a") == "running"
    await upgrade.abort()
    assert recorder.said[-2:] == ["undo", "back"]
    await upgrade.is_only_in("a")


async def test_a_guest_does_not_wait_for_what_hangs(upgrade: Upgrade, recorder: Recorder) -> None:
    await upgrade.advance(CPR, HELD)
    recorder.hangs = {"back"}
    abort = asyncio.create_task(upgrade.handoffs.abort(upgrade.id, SOURCE, "the test says so"))
    async with asyncio.timeout(5):
        while await upgrade.status("a") != "running":  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    abort.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await abort


async def test_what_fails_after_the_commit_is_repeated(upgrade: Upgrade, recorder: Recorder) -> None:
    await upgrade.advance(CPR, HELD)
    recorder.fails = {"running", "released", "finalize"}
    destination = upgrade.handoffs.destination(upgrade.id, Call.ACTIVATE)
    await destination.activate()
    assert destination.state == ACTIVE
    with pytest.raises(HandoffError, match="released can't"):
        await upgrade.handoffs.source(upgrade.id, Call.RELEASE).release()
    with pytest.raises(HandoffError, match="finalize can't"):
        await destination.finalize()
    assert recorder.said.count("running") == 2
    await finish(upgrade)


async def test_a_guest_that_may_not_run_is_given_back(upgrade: Upgrade, recorder: Recorder) -> None:
    await upgrade.advance(CPR, HELD)
    recorder.fails = {"before_run"}
    destination = upgrade.handoffs.destination(upgrade.id, Call.ACTIVATE)
    await destination.activate()
    assert (destination.state, destination.record.never_ran) == (FAILED, True)
    await upgrade.abort()
    await upgrade.is_only_in("a")


@pytest.mark.parametrize("step", ["prepare", "created"])
async def test_what_can_not_be_prepared_leaves_nothing(upgrade: Upgrade, recorder: Recorder, step: str) -> None:
    recorder.fails = {step}
    with pytest.raises(PreconditionError, match=f"{step} can't be done"):
        await upgrade.prepare(UNIX)
    assert recorder.said[-1] == "undo"
    await upgrade.handoffs.abort(upgrade.id, SOURCE, "the test says so")
    await upgrade.is_only_in("a")


async def test_one_that_fails_stops_the_others() -> None:
    ended = asyncio.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def fail() -> None:
        raise KeyError("x")

    with pytest.raises(HandoffError, match="KeyError: 'x'; this is a bug"):
        await together((wait(), fail()))
    assert ended.is_set()


async def test_each_has_its_turn_whatever_fails() -> None:
    done: list[int] = []

    async def note() -> None:
        done.append(1)

    async def fail() -> None:
        raise PreconditionError("no")

    with pytest.raises(PreconditionError):
        await each((fail(), note()), log)
    assert done == [1]
