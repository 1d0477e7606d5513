"""A whole fleet in virtual time: the real Conductor, Driver, Store and Planner; hosts and etcd in memory; faults.

A `Plan` says what goes wrong, and at which message. Messages are counted: the orders to agents, the openings of
watches and the writes of migrations. When its troubles are over, a healthy leader has to bring everything to a true
and clean end.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeVar, cast
from unittest.mock import patch

from fake_etcd import Cluster, FakeEtcd, FakeLeadership
from fake_hosts import NAME, UUID, Bugs, Copy, FakeHost, Guest
from google.protobuf.json_format import Parse
from virtual_time import VirtualDatetime, run

from handoff.agent.v1 import qemu_pb2 as pb
from handoff.agent.v1.host_pb2 import Host, WatchEventsResponse
from handoff.agent.v1.types_pb2 import Domain, Fence
from handoff.controller.v1 import guests_pb2
from handoff.controller.v1.migrations_pb2 import (
    CreateMigrationRequest,
    Migration,
    Placement,
    RecoverMigrationRequest,
    RecoveryTarget,
)
from handoff_agent.rules import FAILED, FINAL_STATES, Role
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
from handoff_controller import decisions, driver, fleet, forward, planner, standstill
from handoff_controller.agents import Agents
from handoff_controller.conductor import Conductor
from handoff_controller.driver import Driver
from handoff_controller.etcd.client import EtcdClient
from handoff_controller.etcd.election import Leadership
from handoff_controller.etcd.txn import TxnResult, put
from handoff_controller.machine import FINAL, PHASES, State, state_of
from handoff_controller.settings import ControllerSettings, EtcdSettings
from handoff_controller.store import GUESTS, MIGRATIONS, encode

Answer = TypeVar("Answer")

HOSTS = ("h1", "h2")
LATENCY_S = 0.002
TIMEOUT_S = 8.0
LONGEST_RETRY_S = 4.0
ZOMBIE_LIFE_S = 90.0
QUIET_WITHIN_S = 900.0
FENCE_S = 2.0
OFF_S = 30.0


class Kind(Enum):
    """What goes wrong at a message, or happens while it is on its way."""

    LOST = auto()
    """It does not arrive, and the sender knows."""
    VANISHED = auto()
    """It does not arrive, and the sender waits for its deadline."""
    ANSWER_LOST = auto()
    """It arrives; the sender waits for its deadline."""
    LATE = auto()
    """As VANISHED, but it arrives `delay_s` after the deadline, whatever has happened meanwhile."""
    REPEATED = auto()
    """It arrives, and once more `delay_s` later. A write to etcd whose answer was lost is sent again by the client."""
    NEW_LEADER = auto()
    """Another controller leads after `delay_s`; the old one does not notice for ZOMBIE_LIFE_S."""
    CANCEL = auto()
    SOURCE_DIES = auto()
    DESTINATION_DIES = auto()
    STREAM_BREAKS = auto()
    SOURCE_CUT = auto()
    """The controllers don't reach the source's agent for `delay_s`."""
    DESTINATION_CUT = auto()
    SOURCE_FREEZES = auto()
    """Its libvirtd does not answer for `delay_s`."""
    DESTINATION_FREEZES = auto()
    ETCD_CUT = auto()


@dataclass(frozen=True)
class Trouble:
    """What happens at the message number `at`. An event happens `after_s` after it was sent."""

    at: int
    kind: Kind
    after_s: float
    delay_s: float


@dataclass(frozen=True)
class Operator:
    """Looks at the record, and decides `after_s` after a decision is needed: for the source, or the destination."""

    after_s: float = 5.0
    to_source: bool = True
    by_hand: bool = False
    """Turns the silent host off himself and says so, instead of having the controllers fence it."""
    only_cuts: bool = False
    """As `by_hand`, but where the copy does not run the host is only cut off for a while."""


@dataclass(frozen=True)
class Plan:
    """One run. `copy_s`: how long the memory takes; `timeout_s`: the migration's own deadline.

    `operator`: what is done when a decision is needed.
    `rounds`: how many migrations of the guest, one after the other, each away from where it is by then.
    """

    troubles: tuple[Trouble, ...] = ()
    copy_s: float = 1.0
    timeout_s: int = 1800
    rounds: int = 1
    operator: Operator = field(default_factory=Operator)


@dataclass(frozen=True)
class Mutant:
    """Seeded bugs; none in the good system."""

    agents: Bugs = field(default_factory=Bugs)
    compares_revisions: bool = True
    compares_leader: bool = True
    driver: type[Driver] = Driver
    fences: bool = True
    """False: the fence command says that the host is off, and does nothing."""


@dataclass(frozen=True)
class Verdict:
    """How a run ended."""

    violations: tuple[str, ...]
    state: State | None
    messages: int
    error: str = ""
    timeline: tuple[str, ...] = ()


class Network:
    """Carries every message, with what the plan says."""

    def __init__(self, world: "World", troubles: Sequence[Trouble]) -> None:
        self.sent = 0
        self._world = world
        self._troubles = {trouble.at: trouble for trouble in troubles}
        self._cut: dict[str, float] = {}

    def cut(self, what: str, for_s: float) -> None:
        self._cut[what] = asyncio.get_running_loop().time() + for_s

    def is_cut(self, what: str) -> bool:
        return asyncio.get_running_loop().time() < self._cut.get(what, 0.0)

    async def read(self, effect: Callable[[], object]) -> None:
        await asyncio.sleep(LATENCY_S)
        if self.is_cut("etcd"):
            raise UnavailableError("etcd is cut off")
        effect()

    async def write(self, keys: Sequence[str], effect: Callable[[bool], TxnResult]) -> TxnResult:
        trouble = self._next() if any(key.startswith(MIGRATIONS) for key in keys) else None

        async def apply() -> TxnResult:
            result = self._world.write(lambda: effect(False))
            if trouble is not None and trouble.kind is Kind.REPEATED:
                await asyncio.sleep(min(trouble.delay_s, LONGEST_RETRY_S))
                return self._world.write(lambda: effect(True))
            return result

        return await self._carry("etcd", trouble, apply, repeats=False)

    async def order(self, host: str, handle: Callable[[], Awaitable[Answer]]) -> Answer:
        return await self._carry(host, self._next(), handle, repeats=True)

    async def open(self, host: str) -> None:
        """Opens a watch."""
        trouble = self._next()
        await asyncio.sleep(LATENCY_S)
        if self.is_cut(host) or (trouble is not None and trouble.kind in (Kind.LOST, Kind.VANISHED, Kind.LATE)):
            raise UnavailableError(f"{host} is cut off")

    async def ask(self, host: str) -> None:
        """A question without effect."""
        await asyncio.sleep(LATENCY_S)
        if self.is_cut(host):
            raise UnavailableError(f"{host} is cut off")

    def _next(self) -> Trouble | None:
        trouble = self._troubles.pop(self.sent, None)
        self.sent += 1
        if trouble is not None:
            self._world.happen(trouble)
        return trouble

    async def _carry(
        self, to: str, trouble: Trouble | None, handle: Callable[[], Awaitable[Answer]], *, repeats: bool
    ) -> Answer:
        kind = trouble.kind if trouble is not None else None
        delay_s = trouble.delay_s if trouble is not None else 0.0
        if kind is Kind.LOST or self.is_cut(to):
            await asyncio.sleep(LATENCY_S)
            raise UnavailableError(f"{to} can't be reached")
        if kind is Kind.VANISHED:
            await asyncio.sleep(TIMEOUT_S)
            raise DeadlineError(f"{to} does not answer")
        arrival_s = TIMEOUT_S + delay_s if kind is Kind.LATE else LATENCY_S
        # What has been sent arrives, also when its sender gives up or dies.
        arrived = self._world.spawn(_arrive(arrival_s, handle))
        if kind is Kind.REPEATED and repeats:
            self._world.spawn(_arrive(arrival_s + delay_s, handle))
        if kind in (Kind.ANSWER_LOST, Kind.LATE):
            await asyncio.sleep(TIMEOUT_S)
            raise DeadlineError(f"{to} does not answer")
        try:
            answer = await asyncio.wait_for(asyncio.shield(arrived), TIMEOUT_S)
        except TimeoutError:
            raise DeadlineError(f"{to} does not answer") from None
        await asyncio.sleep(LATENCY_S)
        if self.is_cut(to):
            raise UnavailableError(f"the answer of {to} was lost")
        return answer


async def _arrive(after_s: float, handle: Callable[[], Awaitable[Answer]]) -> Answer:
    await asyncio.sleep(after_s)
    return await handle()


class FakeAgent:
    """As agents.GrpcAgent."""

    def __init__(self, host: FakeHost, network: Network) -> None:
        self.name = host.name
        self.address = f"{host.name}:7701"
        self._host = host
        self._network = network

    async def get_host(self) -> Host:
        await self._network.ask(self.name)
        return self._host.get_host()

    async def list_domains(self) -> tuple[Domain, ...]:
        await self._network.ask(self.name)
        return self._host.list_domains()

    async def list_handoffs(self) -> tuple[pb.Handoff, ...]:
        await self._network.ask(self.name)
        return self._host.list_handoffs()

    async def watch_events(self) -> AsyncGenerator[WatchEventsResponse, None]:
        await asyncio.Event().wait()
        yield WatchEventsResponse()

    async def watch(self, migration_id: str, role: Role) -> AsyncGenerator[pb.Handoff, None]:
        await self._network.open(self.name)
        async for handoff in self._host.watch(migration_id, role):
            if self._network.is_cut(self.name):
                raise UnavailableError(f"{self.name} is cut off")
            yield handoff

    async def prepare_source(
        self,
        fence: Fence,
        migration_id: str,
        domain_uuid: str,
        *,
        validate_only: bool = False,
        local: bool = False,
        disks: object = (),
    ) -> pb.SourceGuest:
        if validate_only:
            await self._network.ask(self.name)
            return await self._host.validate_source()
        return await self._network.order(self.name, lambda: self._host.prepare_source(fence, migration_id))

    async def prepare_destination(
        self,
        fence: Fence,
        migration_id: str,
        guest: pb.SourceGuest,
        slot: str,
        *,
        validate_only: bool = False,
        method: pb.TransferMethod.ValueType = pb.TRANSFER_METHOD_TCP,
        emulator: str = "",
        fast: bool = False,
        bandwidth_bytes_per_s: int = 0,
    ) -> pb.Handoff:
        if validate_only:
            await self._network.ask(self.name)
            return await self._host.validate_destination()
        return await self._network.order(self.name, lambda: self._host.prepare_destination(fence, migration_id))

    async def start_transfer(
        self,
        fence: Fence,
        migration_id: str,
        uri: str,
        limits: pb.TransferLimits,
        disks: object = (),
        tunnel_address: str = "",
    ) -> pb.Handoff:
        return await self._network.order(self.name, lambda: self._host.start_transfer(fence, migration_id, uri))

    async def switch_over(self, fence: Fence, migration_id: str) -> pb.Handoff:
        return await self._network.order(self.name, lambda: self._host.switch_over(fence, migration_id))

    async def activate(
        self, fence: Fence, migration_id: str, *, heard_clock_ms: int, keep_paused: bool = False
    ) -> pb.Handoff:
        return await self._network.order(self.name, lambda: self._host.activate(fence, migration_id, heard_clock_ms))

    async def release_source(self, fence: Fence, migration_id: str, *, keep_disks: bool = False) -> pb.Handoff:
        return await self._network.order(self.name, lambda: self._host.release_source(fence, migration_id))

    async def finalize_destination(self, fence: Fence, migration_id: str) -> pb.Handoff:
        return await self._network.order(self.name, lambda: self._host.finalize_destination(fence, migration_id))

    async def abort(
        self, fence: Fence, migration_id: str, role: Role, reason: str, *, fenced: bool = False
    ) -> pb.Handoff:
        return await self._network.order(
            self.name, lambda: self._host.abort(fence, migration_id, role, reason, fenced=fenced)
        )


class FakeAgents:
    """As agents.Agents."""

    def __init__(self, agents: Sequence[FakeAgent]) -> None:
        self._agents = {agent.name: agent for agent in agents}

    def __getitem__(self, host: str) -> FakeAgent:
        if host not in self._agents:
            raise NotFoundError(f"no host {host!r}")
        return self._agents[host]

    def __contains__(self, host: object) -> bool:
        return host in self._agents

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._agents))


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
        self.guest = Guest(self.recorded_state, {self.source: Copy.RUNNING, self.destination: Copy.GONE})
        self.tasks: set[asyncio.Task[object]] = set()
        self.network = Network(self, plan.troubles)
        self.hosts = {name: FakeHost(name, self.guest, self.spawn) for name in HOSTS}
        first, second = self.hosts.values()
        first.peer, second.peer = second, first
        for host in self.hosts.values():
            host.bugs = mutant.agents
            host.copy_s = plan.copy_s
        self.conductor: Conductor
        self.cancelled: list[int] = []
        self._plan = plan
        self._fences = mutant.fences
        self._parsed: tuple[int, Migration] | None = None
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
        if self._parsed is None or self._parsed[0] != found.mod_revision:
            self._parsed = (found.mod_revision, Parse(found.value, Migration()))
        return self._parsed[1]

    def recorded_state(self) -> State | None:
        migration = self.migration()
        return None if migration is None else state_of(migration)

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
            self.network.cut(host, OFF_S)
            self.hosts[host].kill_qemu()

    async def _operate(self) -> None:
        operator = self._plan.operator
        while True:
            await asyncio.sleep(1.0)
            migration = self.migration()
            if migration is None or not migration.needs_decision:
                continue
            await asyncio.sleep(operator.after_s)
            fences = operator.by_hand and operator.to_source and state_of(migration) is State.COMMITTED
            if fences and self.network.is_cut(self.destination):
                if operator.only_cuts and self.guest.copies[self.destination] is not Copy.RUNNING:
                    self.network.cut(self.destination, OFF_S)
                else:
                    self.turn_off(self.destination)
            target = RecoveryTarget.RECOVERY_TARGET_DESTINATION
            if operator.to_source or state_of(migration) is not State.COMMITTED:
                target = RecoveryTarget.RECOVERY_TARGET_SOURCE
            request = RecoverMigrationRequest(id=migration.id, target=target, by="operator", accept_loss=True)
            if operator.by_hand and operator.to_source:
                request.fenced_host = self.destination
            if state_of(migration) is State.COMMITTED:
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
            case Kind.ETCD_CUT:
                self.network.cut("etcd", trouble.delay_s)

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
        before = self.recorded_state()
        result = effect()
        after = self.recorded_state()
        if before is not None and after not in (before, *_followers(before)):
            self.guest.violations.append(f"the record went from {before} to {after}")
        return result

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
        patch.object(conductor_module, "Driver", mutant.driver),
        patch.object(conductor_module, "FenceCommand", lambda _: FakeFencing(worlds[-1])),
    ):
        return run(main)
