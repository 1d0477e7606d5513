"""Runs one cell from a healthy fleet to a healthy fleet."""

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Final

import grpc.aio
import structlog

from handoff.controller.v1.migrations_pb2 import Migration
from handoff_controller.machine import FINAL, State, state_of
from handoff_lab.errors import LabError
from soak.cells import Cell, Expectation, Where, expectation
from soak.clients import Missed, story
from soak.faults import is_for_good
from soak.hold import Hold
from soak.inject import Injection
from soak.moments import STATE_OF, Moment
from soak.proof import Findings, Witnesses, judge
from soak.scene import Cast, Scene

log = structlog.get_logger()

TOLD_S: Final = 90.0
"""How long a migration may take until it is final, or says what it waits for, while the fault lasts. One that waits for
its turn first waits for the abort of another, which meets the same fault."""
ENDS_S: Final = 60.0
"""How long it may take once the fault is over."""
ATTEMPTS: Final = 3
SETTLES_S: Final = 0.5
DIES_S: Final = 5.0


@dataclass(slots=True)
class Result:
    """What came of a cell, as matrix.json has it."""

    cell: str
    moment: str
    fault: str
    expected: str
    lane: str = ""
    """Which guest was moved."""
    ok: bool = False
    state: str = ""
    """The migration's final state."""
    where: str = ""
    outage_ms: float | None = None
    """How long the fault kept it from running, as seen from outside; None for one that is lost."""
    silences_ms: list[tuple[int, int]] = field(default_factory=list)
    """Each silence of the guest: when it began, from the fault on, and its length."""
    waited: bool = False
    """While the fault lasted the guest stood still, and the record said why."""
    seconds: float = 0.0
    attempts: int = 1
    """How many migrations it took to hold one at the moment."""
    problems: list[str] = field(default_factory=list)
    migration: str = ""
    story: str = ""
    """Its states, its error, its warnings."""


async def run_cell(scene: Scene, cell: Cell) -> Result:
    """Runs a cell. What goes wrong is in the result; the fleet is to be looked after by the caller."""
    expected = expectation(cell)
    assert expected is not None, f"{cell.name} has nothing to break"
    result = Result(cell.name, str(cell.moment), cell.fault.name, str(expected.where), scene.lane.name)
    began = time.monotonic()
    try:
        await _run(scene, cell, expected, result)
    except (Missed, LabError, OSError, TimeoutError) as error:
        result.problems.append(f"{type(error).__name__}: {error}")
    except grpc.aio.AioRpcError as error:
        result.problems.append(f"{error.code().name}: {error.details()}")
    result.seconds = round(time.monotonic() - began, 1)
    result.ok = not result.problems
    return result


async def _run(scene: Scene, cell: Cell, expected: Expectation, result: Result) -> None:
    async with Witnesses(scene) as witnesses, AsyncExitStack() as fault:
        async with scene.holding:
            cast, hold = await _held(scene, cell.moment, result)
            injection = Injection(scene, cast, cell.fault, hold.destination_qemu)
            fault.push_async_callback(injection.heal)
            try:
                await injection.strike()
            finally:
                await hold.release(injection.struck)
        result.migration = hold.migration_id
        if is_for_good(cell.fault):
            await _last(scene, expected, hold.migration_id, witnesses, result)
        await fault.aclose()
        migration = await scene.controllers.ends(hold.migration_id, ENDS_S)
        result.state, result.story = state_of(migration).name, story(migration)
        if not _was_in(migration, cell.moment, injection.at_s):
            result.problems.append(f"the fault did not strike in {cell.moment}: {story(migration)}")
        await _comes_to_rest(witnesses, expected)
        findings = await judge(scene, cast, expected, witnesses, migration, injection.at_ns)
        await hold.end()
    _note(findings, result)


async def _held(scene: Scene, moment: Moment, result: Result) -> tuple[Cast, Hold]:
    """A migration that is held at the moment. One that slipped through did not have its fault: the next one has."""
    for left in reversed(range(ATTEMPTS)):
        cast = await scene.cast()
        hold = Hold(scene, cast)
        try:
            await hold.reach(moment)
        except BaseException as error:
            await hold.release()
            if not isinstance(error, Missed) or not left or not hold.migration_id:
                raise
            result.attempts += 1
            log.warning("the moment slipped by", moment=str(moment), why=str(error))
            await scene.controllers.ends(hold.migration_id, ENDS_S)
            await hold.end()
        else:
            return cast, hold
    raise AssertionError("the last attempt raises")


async def _last(scene: Scene, expected: Expectation, migration_id: str, witnesses: Witnesses, result: Result) -> None:
    """Waits while a fault lasts, until the migration is final, or says what it waits for."""
    migration = await _told(scene, migration_id)
    await asyncio.sleep(SETTLES_S)
    result.waited = not witnesses.runs()
    if result.waited and not expected.waits:
        result.problems.append(f"the guest does not run while the fault lasts: {story(migration)}")
    if result.waited and not migration.needs_decision:
        result.problems.append(f"the guest waits, and nobody is told what to decide: {story(migration)}")


async def _told(scene: Scene, migration_id: str) -> Migration:
    """Raises Missed when it says nothing."""
    try:
        return await scene.controllers.until(migration_id, _is_told, TOLD_S)
    except Missed:
        migration = await scene.controllers.until(migration_id, lambda _: True, TOLD_S)
        # The fault keeps the one before it.
        if state_of(migration) is State.PLANNED and migration.waiting_for:
            return migration
        raise


def _is_told(migration: Migration) -> bool:
    """It is final, or says what keeps it."""
    return state_of(migration) in FINAL or bool(migration.warnings or migration.needs_decision)


async def _comes_to_rest(witnesses: Witnesses, expected: Expectation) -> None:
    """Waits until the guest answers, or for one that is lost, until it surely does not."""
    loop = asyncio.get_running_loop()
    until = loop.time() + DIES_S
    while loop.time() < until and witnesses.runs() is (expected.where is Where.LOST):  # noqa: ASYNC110 - it is polled
        await asyncio.sleep(0.05)
    await asyncio.sleep(SETTLES_S)


def _was_in(migration: Migration, moment: Moment, at_s: float) -> bool:
    """Whether the fault struck at its moment, by the clock that all of the lab shares."""
    entered = [State(change.state) for change in migration.timeline if change.time.ToNanoseconds() / 1e9 <= at_s]
    # The record has the time of the leader's decision; etcd, which was frozen, has it later.
    decided = {State.COMMITTED} if moment is Moment.HELD else set()
    return bool(entered) and entered[-1] in {STATE_OF[moment]} | decided


def _note(findings: Findings, result: Result) -> None:
    result.where = findings.where
    result.outage_ms = None if findings.outage_ms is None else round(findings.outage_ms, 1)
    result.silences_ms = findings.silences_ms
    result.problems += findings.problems
