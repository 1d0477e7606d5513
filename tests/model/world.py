"""A whole fleet in virtual time: the real Conductor, Driver, Store and Planner; hosts and etcd in memory; faults.

A `Plan` says what goes wrong, and at which message. Messages are counted: the orders to agents, the openings of
watches and the writes of migrations. When its troubles are over, a healthy leader has to bring everything to a true
and clean end.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import TypeVar, cast
from unittest.mock import patch

from fake_agents import FakeAgent, FakeAgents, FakeVolumes
from fake_etcd import Cluster, FakeEtcd, FakeLeadership
from fake_guest import NAME, UUID, Copy, Guest
from fake_hosts import FakeHost
from fake_network import Network
from google.protobuf.json_format import Parse
from plans import Kind, Mutant, Plan, Trouble, Verdict
from virtual_time import VirtualDatetime, run

from handoff.agent.v1 import qemu_pb2 as pb
from handoff.controller.v1 import guests_pb2
from handoff.controller.v1.migrations_pb2 import (
    CreateMigrationRequest,
    Migration,
    Placement,
    RecoverMigrationRequest,
    RecoveryTarget,
)
from handoff_agent.rules import FAILED, FINAL_STATES
from handoff_common.errors import (
    ConflictError,
    DeadlineError,
    HandoffError,
    NotFoundError,
    PreconditionError,
    StaleTermError,
    UnavailableError,
)
from handoff_controller import conductor as conductor_module
from handoff_controller import decisions, driver, fleet, forward, planner, standstill, undo
from handoff_controller.agents import Agents
from handoff_controller.conductor import Conductor
from handoff_controller.etcd.client import EtcdClient
from handoff_controller.etcd.election import Leadership
from handoff_controller.etcd.txn import TxnResult, put
from handoff_controller.machine import FINAL, PHASES, State, state_of
from handoff_controller.settings import ControllerSettings, EtcdSettings
from handoff_controller.store import GUESTS, MIGRATIONS, encode

Answer = TypeVar("Answer")

HOSTS = ("h1", "h2")
ZOMBIE_LIFE_S = 90.0
QUIET_WITHIN_S = 900.0
FENCE_S = 2.0
OFF_S = 30.0


class FakeFencing:
    """As fencing.FenceCommand."""

    configured = True
    automatic_after_s = 0.0

    def __init__(self, world: "World") -> None:
        self._world = world

    async def fence(self, host: str) -> str:
        await asyncio.sleep(FENCE_S)
        self._world.turn_off(host)
        return f"{host} was fenced"


class World:
    """Everything that there is in one run."""

    def __init__(self, plan: Plan, mutant: Mutant) -> None:
        self.cluster = Cluster(mutant.compares_revisions, mutant.compares_leader)
        self.migration_id = "m1"
        self.source, self.destination = HOSTS
        copies = {self.source: Copy.RUNNING, self.destination: Copy.GONE}
        self.guest = Guest(self.migration, copies, whole={self.source}, admitted={self.source})
        self.tasks: set[asyncio.Task[object]] = set()
        self.network = Network(self, plan.troubles)
        self.hosts = {name: FakeHost(name, self.guest, self.spawn) for name in HOSTS}
        first, second = self.hosts.values()
        first.peer, second.peer = second, first
        for host in self.hosts.values():
            host.bugs = mutant.agents
            host.copy_s, host.pull_s = plan.copy_s, plan.pull_s
        self.volumes = FakeVolumes(self.guest, self.network, forgets=mutant.storage_forgets)
        self.conductor: Conductor
        self.cancelled: list[int] = []
        self._plan = plan
        self._fences = mutant.fences
        self._parsed: tuple[str, int, Migration] | None = None
        self._agents = FakeAgents([FakeAgent(host, self.network) for host in self.hosts.values()])

    def spawn(self, coroutine: Coroutine[object, object, Answer]) -> asyncio.Task[Answer]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Answer]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, HandoffError):
            self.guest.violations.append(f"a task failed: {error!r}")

    def migration(self) -> Migration | None:
        """What the store says; parsed once for each change."""
        found = self.cluster.keys.get(MIGRATIONS + self.migration_id)
        if found is None:
            return None
        if self._parsed is None or self._parsed[:2] != (self.migration_id, found.mod_revision):
            self._parsed = (self.migration_id, found.mod_revision, Parse(found.value, Migration()))
        return self._parsed[2]

    def recorded_state(self) -> State | None:
        return self.guest.recorded()

    def recorded_guest(self) -> guests_pb2.Guest:
        return Parse(self.cluster.keys[GUESTS + UUID].value, guests_pb2.Guest())

    def lead(self) -> None:
        """Another controller takes over; the one before goes on for a while, without knowing."""
        leadership = self.cluster.elect()
        settings = ControllerSettings(
            name=f"c{leadership.term}",
            advertise="127.0.0.1:7700",
            etcd=EtcdSettings(endpoints=("127.0.0.1:2379",)),
            hosts={name: f"{name}:7701" for name in self.hosts},
        )
        self.conductor = Conductor(
            cast(EtcdClient, FakeEtcd(self.cluster, self.network)),
            cast(Leadership, leadership),
            cast(Agents, self._agents),
            settings,
        )
        self.spawn(self._work(self.conductor, leadership))

    async def _work(self, conductor: Conductor, leadership: FakeLeadership) -> None:
        work = asyncio.create_task(conductor.run())
        try:
            while not work.done() and conductor is self.conductor:
                await asyncio.wait({work}, timeout=1.0)
            await asyncio.wait({work}, timeout=ZOMBIE_LIFE_S)
            if work.done():
                self._judge_end(work, conductor)
        finally:
            leadership.over = True
            work.cancel()
            await asyncio.wait({work})

    def _judge_end(self, work: asyncio.Task[None], conductor: Conductor) -> None:
        if not isinstance(work.exception(), StaleTermError) or conductor is self.conductor:
            self.guest.violations.append(f"a leader's work ended with {work.exception()!r}")

    def turn_off(self, host: str) -> None:
        """Its QEMUs are gone at once; its agent is back after a while."""
        if self._fences:
            self._lose_power(host, OFF_S)

    def _lose_power(self, host: str, for_s: float) -> None:
        self.network.cut(host, for_s)
        self.hosts[host].turn_off(for_s)

    async def _operate(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            migration = self.migration()
            if migration is None or not migration.needs_decision:
                continue
            await asyncio.sleep(self._plan.operator.after_s)
            await self._decide()

    async def _decide(self) -> None:
        """What he says of a host that he has turned off is true; of one that he gives up it may be wrong."""
        migration, operator = self.migration(), self._plan.operator
        state = None if migration is None else state_of(migration)
        if state is None:
            return
        request = RecoverMigrationRequest(id=self.migration_id, by="operator", accept_loss=True)
        request.target = RecoveryTarget.RECOVERY_TARGET_SOURCE
        if operator.pulls_the_plug(state) and self.network.is_cut(self.destination):
            if operator.only_cuts and self.guest.copies[self.destination] is not Copy.RUNNING:
                self.network.cut(self.destination, OFF_S)
            else:
                self.turn_off(self.destination)
            request.fenced_host = self.destination
        elif state is State.ABORTING:
            if not self.hosts[self.source].is_off:
                return
            request.fenced_host = self.source
        elif not operator.to_source:
            request.target = RecoveryTarget.RECOVERY_TARGET_DESTINATION
            if state is State.FINISHING:
                request.fenced_host = self.source
        with contextlib.suppress(HandoffError, TimeoutError):
            async with asyncio.timeout(30.0):
                await self.conductor.recover(request)

    def happen(self, trouble: Trouble) -> None:
        self.spawn(self._happen(trouble))

    async def _happen(self, trouble: Trouble) -> None:
        await asyncio.sleep(trouble.after_s)
        match trouble.kind:
            case Kind.NEW_LEADER:
                self.lead()
            case Kind.CANCEL:
                await self._cancel()
            case Kind.SOURCE_DIES:
                self.hosts[self.source].kill_qemu()
            case Kind.DESTINATION_DIES:
                self.hosts[self.destination].kill_qemu()
            case Kind.STREAM_BREAKS:
                self.hosts[self.source].stream_broken = True
            case Kind.SOURCE_CUT:
                self.network.cut(self.source, trouble.delay_s)
            case Kind.DESTINATION_CUT:
                self.network.cut(self.destination, trouble.delay_s)
            case Kind.SOURCE_FREEZES:
                self.hosts[self.source].freeze(trouble.delay_s)
            case Kind.DESTINATION_FREEZES:
                self.hosts[self.destination].freeze(trouble.delay_s)
            case Kind.SOURCE_OFF:
                self._lose_power(self.source, trouble.delay_s)
            case Kind.DESTINATION_OFF:
                self._lose_power(self.destination, trouble.delay_s)
            case Kind.ETCD_CUT:
                self.network.cut("etcd", trouble.delay_s)
            case Kind.DECISION:
                await self._decide()

    async def _cancel(self) -> None:
        try:
            cancelled = await self.conductor.cancel(self.migration_id)
        except HandoffError:
            return
        self.cancelled.append(cancelled.state)
        if state_of(cancelled) in (State.COMMITTED, State.FINISHING, State.DONE):
            self.guest.violations.append(f"a cancel was granted in {state_of(cancelled)}")

    def write(self, effect: Callable[[], TxnResult]) -> TxnResult:
        """Applies a transaction, and sees that the record follows the state machine."""
        before, had_arrived = self.recorded_state(), self._has_arrived()
        result = effect()
        after = self.recorded_state()
        if had_arrived and not self._has_arrived():
            self.guest.violations.append("disks that had arrived, by the record, have not")
        if had_arrived and after is State.ABORTING:
            self.guest.violations.append("the guest was taken back after its disks had arrived")
        if before is not None and after not in (before, *_followers(before)):
            self.guest.violations.append(f"the record went from {before} to {after}")
        return result

    def _has_arrived(self) -> bool:
        migration = self.migration()
        return migration is not None and migration.disks_arrived

    async def play(self) -> None:
        """Every round, from the operator's request to the quiet end."""
        record = guests_pb2.Guest(uuid=UUID, name=NAME, owner=Placement(host=self.source, slot="a"), generation=1)
        self.cluster.apply([], [put(GUESTS + UUID, encode(record))], [])
        self.lead()
        for number in range(1, self._plan.rounds + 1):
            self.migration_id = f"m{number}"
            self.cancelled.clear()
            self.guest.told_to_run.clear()
            await self._play_round()
            if self.guest.violations or self.guest.killed:
                break
            if self.guest.copies[self.destination] is Copy.RUNNING:
                self.source, self.destination = self.destination, self.source
        while self.tasks:
            for task in set(self.tasks):
                task.cancel()
            await asyncio.wait(set(self.tasks))

    async def _play_round(self) -> None:
        request = self.spawn(self._request())
        operator = self.spawn(self._operate())
        try:
            async with asyncio.timeout(QUIET_WITHIN_S):
                while not self._is_quiet():  # noqa: ASYNC110 - virtual time
                    await asyncio.sleep(0.5)
        except TimeoutError:
            self.guest.violations.append(f"not quiet after {QUIET_WITHIN_S:g} s: {self._leftovers()}")
        request.cancel()
        operator.cancel()
        self._judge_end_state()

    async def _request(self) -> None:
        request = CreateMigrationRequest(guest=NAME, destination_host=self.destination, request_id=self.migration_id)
        request.options.timeout.FromSeconds(self._plan.timeout_s)
        request.options.fast = self._plan.pull_s > 0
        while self.migration() is None:
            try:
                async with asyncio.timeout(20.0):
                    await self.conductor.create(request)
            except (UnavailableError, DeadlineError, ConflictError, StaleTermError, TimeoutError):
                await asyncio.sleep(0.5)
            except (NotFoundError, PreconditionError):  # its QEMU has died, or what was recorded late has it
                if Copy.RUNNING not in self.guest.copies.values():
                    return
                await asyncio.sleep(0.5)

    def _is_quiet(self) -> bool:
        if self.recorded_state() is None:
            return self.source in self.guest.killed
        return not self._leftovers()

    def _leftovers(self) -> tuple[str, ...]:
        state = self.recorded_state()
        left = () if state in FINAL else (f"record {state}",)
        return left + tuple(
            f"{host.name}: {pb.HandoffRole.Name(one.role)} {pb.HandoffState.Name(one.state)}"
            for host in self.hosts.values()
            for one in host.handoffs.values()
            # A copy that died after it ran leaves nothing but its record.
            if one.state not in FINAL_STATES and not (state is State.DONE and one.state == FAILED)
        )

    def _judge_end_state(self) -> None:
        state, copies, guest = self.recorded_state(), self.guest.copies, self.guest
        if state is None:
            return
        owner, other = (self.destination, self.source) if state is State.DONE else (self.source, self.destination)
        if copies[owner] is not Copy.RUNNING and owner not in guest.killed:
            guest.violations.append(f"{state}, but the copy on {owner} is {copies[owner]}")
        if copies[other] is not Copy.GONE:
            guest.violations.append(f"{state}, but there is a copy on {other}: {copies[other]}")
        if state is State.DONE and copies[owner] is not Copy.RUNNING and owner not in guest.told_to_run:
            guest.violations.append("DONE, but the destination never ran and the source is gone")
        if not guest.killed:
            record = self.recorded_guest()
            if record.owner.host != owner:
                guest.violations.append(f"{state}, but the guest belongs to {record.owner.host}")
            if record.active_migration:
                guest.violations.append(f"{state}, but {record.active_migration} still has the guest")
        migration = self.migration()
        assert migration is not None
        if guest.admitted != {owner} and not any("by hand" in warning for warning in migration.warnings):
            guest.violations.append(f"{state} on {owner}, but {sorted(guest.admitted)} may open its volume")
        if (
            self._plan.pull_s
            and not migration.options.keep_source_disks
            and (guest.whole, guest.lacking) != ({owner}, set())
        ):
            images = f"whole {sorted(guest.whole)}, lacking {sorted(guest.lacking)}"
            guest.violations.append(f"{state} on {owner}, but its images are: {images}")
        if self.cancelled and state is State.DONE:
            guest.violations.append("a granted cancel was followed by the commit")


def _followers(state: State) -> tuple[State | None, ...]:
    phase = PHASES.get(state)
    return () if phase is None else (phase.completed, phase.failed, phase.fenced)


def play(plan: Plan, mutant: Mutant | None = None) -> Verdict:
    """Runs one plan to its end, in virtual time."""
    mutant = mutant or Mutant()

    worlds: list[World] = []

    async def main() -> Verdict:
        world = World(plan, mutant)
        worlds.append(world)
        await world.play()
        migration = world.migration()
        return Verdict(
            tuple(world.guest.violations),
            world.recorded_state(),
            world.network.sent,
            migration.error if migration else "",
            tuple(state_of(Migration(state=change.state)).name for change in migration.timeline) if migration else (),
        )

    with (
        patch.object(driver, "datetime", VirtualDatetime),
        patch.object(planner, "datetime", VirtualDatetime),
        patch.object(fleet, "datetime", VirtualDatetime),
        patch.object(decisions, "datetime", VirtualDatetime),
        patch.object(forward, "datetime", VirtualDatetime),
        patch.object(standstill, "datetime", VirtualDatetime),
        patch.object(undo, "datetime", VirtualDatetime),
        patch.object(conductor_module, "Volumes", lambda _: worlds[-1].volumes),
        patch.object(conductor_module, "Driver", mutant.driver),
        patch.object(conductor_module, "FenceCommand", lambda _: FakeFencing(worlds[-1])),
    ):
        return run(main)
