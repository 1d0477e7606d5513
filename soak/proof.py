"""Judges a cell: by the guest's own journal, clock and counters; then whether the record agrees."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

import grpc.aio

from handoff.agent.v1.types_pb2 import DomainState
from handoff.controller.v1.guests_pb2 import Guest
from handoff.controller.v1.migrations_pb2 import Migration
from handoff_controller.machine import FINAL, State, state_of
from handoff_lab.errors import LabError
from handoff_lab.journal import check_image
from handoff_lab.probe import GuestControl, TcpSession
from soak.cells import Expectation, Where
from soak.clients import story
from soak.disks import spoiled
from soak.leftovers import LOOK_AGAIN_S, none_left
from soak.pulse import Pulse
from soak.scene import OBSERVER, Cast, Scene
from soak.writers import RATE_MIB_PER_S, SPAN_MIB, Writers

CONTROL_S: Final = 10.0
LEFTOVERS_S: Final = 25.0
HEARD_S: Final = 10.0
FEWEST_RECORDS: Final = 10


@dataclass(slots=True)
class Findings:
    """What was found of a cell. `problems`: each a sentence; none is what we want."""

    where: str = ""
    """The host's part, "source" or "destination"; "nowhere" for a guest that is gone."""
    outage_ms: float | None = None
    """See Pulse.outage_ms; None for a guest that is gone."""
    silences_ms: list[tuple[int, int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Witnesses:
    """They watch the guest through a cell. Use it as a context."""

    def __init__(self, scene: Scene) -> None:
        node, address, interface = scene.fleet.node(OBSERVER), scene.guest.ip, scene.interface
        self._scene = scene
        self._control = GuestControl(node, address, CONTROL_S, interface=interface)
        self.pulse = Pulse.within(node, address, interface)
        self._session = TcpSession(node, address, interface=interface)
        self._writers = Writers({scene.image_on(host) for host in scene.lane.hosts})
        self._stack = AsyncExitStack()
        self._boot_id = ""

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            before = await self._control.status()
            self._boot_id = before.boot_id
            if not before.journal.running:
                await self._control.journal_start(RATE_MIB_PER_S, SPAN_MIB, f"/dev/{self._scene.journal.target}")
            stack.enter_context(self._writers)
            stack.enter_context(self.pulse)
            await stack.enter_async_context(self._session)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def runs(self) -> bool:
        """Whether the guest answers."""
        return self.pulse.quiet_for_s() < 0.3

    async def alive(self, home: str | None) -> list[str]:
        """What the guest, which still runs, has against it. `home`: where; None when nobody knows."""
        problems = [self.pulse.contradiction] if self.pulse.contradiction else []
        try:
            status = await self._control.status()
            stopped = await self._control.journal_stop()
            inside = await self._control.journal_verify()
        except (OSError, TimeoutError, LabError) as error:
            return [*problems, f"the guest does not answer: {error or 'no answer in time'}"]
        if status.boot_id != self._boot_id:
            problems.append("the guest has rebooted")
        problems += await asyncio.to_thread(self._writers.problems, stopped.epoch, stopped.acked_seq)
        if not inside.intact:
            problems.append(f"the guest's journal is broken: {inside}")
        if home is not None:
            image, disk = self._scene.image_on(home), self._scene.journal
            try:
                outside = await asyncio.to_thread(
                    check_image, image, disk.format, stopped.epoch, stopped.slots, stopped.acked_seq
                )
            except OSError as error:
                problems.append(f"the journal on the disk can't be read: {error}")
            else:
                if not outside.intact:
                    problems.append(f"the journal on the disk is broken: {outside}")
        if self._writers.records < FEWEST_RECORDS:
            problems.append(f"only {self._writers.records} records of the journal were seen")
        session = await self._session.close()
        if not session.survived:
            problems.append(f"the guest's TCP session did not survive: {session.error or f'{session.wrong} wrong'}")
        return problems

    async def dead(self) -> list[str]:
        """What the traces of a guest that is gone have against it."""
        problems = [self.pulse.contradiction] if self.pulse.contradiction else []
        problems += await asyncio.to_thread(self._writers.contradictions)
        if self.runs():
            problems.append("the guest still answers")
        return problems


async def judge(
    scene: Scene, cast: Cast, expected: Expectation, witnesses: Witnesses, migration: Migration, struck_ns: int
) -> Findings:
    """The verdict on a cell whose fault is over."""
    findings = Findings()
    lost = expected.where is Where.LOST
    home = await asyncio.to_thread(_home, scene)
    findings.problems += await (witnesses.dead() if lost else witnesses.alive(home))
    findings.where = _part(cast, home)
    findings.silences_ms = witnesses.pulse.silences_ms(struck_ns)
    if not lost:
        findings.outage_ms = witnesses.pulse.outage_ms(struck_ns)
        findings.problems += _outage(findings.outage_ms, expected)
    allowed = {Where.EITHER: {"source", "destination"}, Where.LOST: {"nowhere"}}
    if findings.where not in allowed.get(expected.where, {str(expected.where)}):
        findings.problems.append(f"the guest is {findings.where}, not {expected.where}: {story(migration)}")
    left = await none_left(scene, home, LEFTOVERS_S)
    if scene.local_disks:
        findings.problems += await asyncio.to_thread(spoiled, scene)
    findings.problems += [f"left behind: {what}" for what in left]
    findings.problems += await record_problems(scene, cast, migration, home)
    return findings


def _home(scene: Scene) -> str | None:
    active = [seen for seen in scene.guests.find(scene.guest.name) if seen.state == "running"]
    return active[0].host if len(active) == 1 else None


def _part(cast: Cast, home: str | None) -> str:
    return {cast.source: "source", cast.destination: "destination"}.get(home or "", "nowhere")


def _outage(outage_ms: float | None, expected: Expectation) -> list[str]:
    if outage_ms is None:
        return ["the guest does not run"]
    if expected.outage_s is not None and not expected.waits and outage_ms > 1000 * expected.outage_s:
        return [f"the guest was away for {outage_ms:.0f} ms, more than {expected.outage_s:g} s"]
    return []


async def _record(scene: Scene, home: str | None) -> Guest | None:
    """The guest's record; of one that runs, once its host has been heard of again. Raises AioRpcError."""
    until = asyncio.get_running_loop().time() + HEARD_S
    while True:
        guest = await scene.controllers.guest(scene.guest.uuid)
        is_lost = guest is not None and guest.HasField("loss")
        if home is None or not is_lost or asyncio.get_running_loop().time() > until:
            return guest
        await asyncio.sleep(LOOK_AGAIN_S)


async def record_problems(scene: Scene, cast: Cast, migration: Migration, home: str | None) -> list[str]:
    """Where the records do not tell the truth."""
    state = state_of(migration)
    if state not in FINAL:
        return [f"the migration has not ended: {story(migration)}"]
    problems = []
    said = cast.destination if state is State.DONE else cast.source
    if home is not None and home != said:
        problems.append(f"the record says {state.name}, and the guest is at {home}: {story(migration)}")
    if state is State.ABORTED and not migration.error:
        problems.append("the record does not say why it was aborted")
    if migration.needs_decision:
        problems.append(f"the record still asks for a decision: {migration.needs_decision}")
    # That its host did not answer may have been true when the migration ended; the guest's own record knows better now.
    if home is not None and migration.loss.certain:
        problems.append(f"the guest is there, and the record has it as lost: {migration.loss.reason}")
    try:
        guest = await _record(scene, home)
    except grpc.aio.AioRpcError as error:
        return [*problems, f"the guest's record can't be read: {error.details()}"]
    if guest is None:
        return [] if home is None else [*problems, "the guest has no record"]
    # One that ends after all was said of it, by its migration, is the matter of the guest's own record.
    is_known_to_be_gone = migration.loss.certain or guest.domain.state != DomainState.DOMAIN_STATE_RUNNING
    if home is None and state is State.DONE and not is_known_to_be_gone:
        problems.append(f"the guest is gone, and no record says so: {story(migration)}")
    if guest.owner.host != said:
        problems.append(f"the guest belongs to {guest.owner.host} by its record, to {said} by the migration's")
    if home is not None and guest.HasField("loss"):
        problems.append(f"the guest is there, and its record has it as lost: {guest.loss.reason}")
    if guest.active_migration:
        problems.append(f"the guest still has migration {guest.active_migration}")
    if guest.conflicts:
        problems.append(f"the guest's record has conflicts: {list(guest.conflicts)}")
    return problems
