"""The leader's work: one driver for each migration that is not final, admission, and the look at the fleet."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

import structlog

from handoff.agent.v1.types_pb2 import Fence
from handoff.controller.v1.migrations_pb2 import (
    CreateMigrationRequest,
    CreateUpgradeRequest,
    Migration,
    RecoverMigrationRequest,
)
from handoff_common.errors import (
    ConflictError,
    DeadlineError,
    NotFoundError,
    PreconditionError,
    StaleTermError,
    UnavailableError,
)
from handoff_controller.admission import admit
from handoff_controller.agents import Agents
from handoff_controller.decisions import Decision, check_decidable, check_fence, is_taken
from handoff_controller.driver import Driver
from handoff_controller.etcd.client import EtcdClient
from handoff_controller.etcd.election import Leadership
from handoff_controller.fencing import FenceCommand
from handoff_controller.fleet import Fleet
from handoff_controller.machine import FINAL, State, state_of
from handoff_controller.network import FabricView
from handoff_controller.network_keeper import NetworkKeeper
from handoff_controller.planner import Planner, check_same
from handoff_controller.retention import forgettable, lost_for_long
from handoff_controller.rollouts import Rollouts
from handoff_controller.settings import ControllerSettings
from handoff_controller.settle import Settler
from handoff_controller.store import Store
from handoff_controller.upgrade_planner import UpgradePlanner
from handoff_controller.volumes import Volumes

log = structlog.get_logger()

PASSING = (ConflictError, UnavailableError, DeadlineError)
ADOPT_EVERY_S = 5.0
FORGET_EVERY_S = 300.0
FORGOTTEN_AT_ONCE = 200
RETRY_S = 0.5
RETRY_AFTER_BUG_S = 5.0
ON_THE_WAY = frozenset({State.PREPARING, State.COPYING, State.SWITCHING, State.COMMITTED, State.FINISHING})


class Conductor:
    """All that only the leader does, for one term. `run` it; the other methods may be called while it runs."""

    def __init__(
        self, client: EtcdClient, leadership: Leadership, agents: Agents, settings: ControllerSettings
    ) -> None:
        self.leadership = leadership
        self._store = Store(client, leadership)
        self._agents = agents
        self._settings = settings
        self._fence = Fence(term=leadership.term, leader=settings.name)
        self._planner = Planner(self._store, agents, self._fence)
        self._upgrades = UpgradePlanner(self._store, agents, self._fence)
        self._network = NetworkKeeper(agents, self._store, self._fence, FabricView(settings.static_ports), self._moving)
        self._settler = Settler(self._store, self._fence, self._is_driven)
        self._fleet = Fleet(agents, self._store, self._settler, self._network.look_again)
        self._fencing = FenceCommand(settings.fencing)
        self.rollouts = Rollouts(self._store, agents, self.create)
        self._volumes = Volumes(settings.volumes)
        self._drivers: dict[str, Driver] = {}
        self._admitted: dict[str, asyncio.Event] = {}
        self._adopted = asyncio.Event()
        self._left_alone: set[str] = set()
        self._group = asyncio.TaskGroup()

    async def run(self) -> None:
        """Adopts what is in flight and works until cancelled. Raises StaleTermError when we don't lead any more."""
        try:
            async with self._group:
                await self._adopt_all()
                self._group.create_task(self._keep_adopting(), name="adoption")
                self._group.create_task(self.rollouts.run(), name="rollouts")
                self._group.create_task(self._keep_forgetting(), name="retention")
                self._group.create_task(self._network.run(), name="network")
                await self._fleet.run()
        except BaseExceptionGroup as group:
            stale, others = group.split(StaleTermError)
            if stale is not None and others is None:
                raise StaleTermError(f"term {self.leadership.term} has ended while it was at work") from group
            raise
        finally:
            await self._volumes.close()

    async def create(self, request: CreateMigrationRequest | CreateUpgradeRequest) -> Migration:
        """Plans, records and starts a migration; see CreateMigration and CreateUpgrade for what it raises."""
        # Admission must know of everything that is in flight.
        await self._adopted.wait()
        if request.request_id and (known := await self._store.find_migration(request.request_id)) is not None:
            check_same(request, known)
            return known
        planned = await self._planned(request)
        if isinstance(request, CreateMigrationRequest) and request.validate_only:
            return planned
        migration = await self._store.create(planned)
        self._start(migration)
        await self._admit()
        return migration

    async def cancel(self, beginning: str) -> Migration:
        """Asks for the abort. Raises NotFoundError, or PreconditionError when the migration is past the commit."""
        migration = await self._store.migration(beginning)
        while (driver := self._drivers.get(migration.id)) is not None:
            cancelled = await driver.cancel()
            # Unless another driver has taken its place meanwhile, from a record that did not know of the wish.
            if self._drivers.get(migration.id) in (driver, None):
                return cancelled
        if state_of(migration) in FINAL:
            raise PreconditionError(f"migration {migration.id} is {state_of(migration).name} already")
        raise UnavailableError(f"migration {migration.id} is just being taken over; try again")

    async def recover(self, request: RecoverMigrationRequest) -> Migration:
        """Carries out what an operator decides; see RecoverMigration for what it raises."""
        migration = await self._store.migration(request.id)
        decision = Decision(request.target, request.by or "unknown", request.fenced_host, request.accept_loss)
        driver = self._drivers.get(migration.id)
        if driver is not None:
            return await driver.recover(decision)
        check_fence(migration, decision)
        if is_taken(migration, decision):
            return migration
        check_decidable(migration, decision)
        raise UnavailableError(
            f"nobody works at migration {migration.id} at the moment: {migration.waiting_for or 'try again'}"
        )

    async def _adopt_all(self) -> None:
        while True:
            try:
                in_flight = await self._store.migrations()
                break
            except PASSING as error:
                log.warning("the migrations can't be read", error=error.message)
        for migration in in_flight:
            await self._adopt(migration)
        self._adopted.set()
        await self._admit()

    async def _keep_adopting(self) -> None:
        """Takes on what was recorded without an answer: its creator does not know, and nobody drives it."""
        while True:
            await asyncio.sleep(ADOPT_EVERY_S)
            # One whose driver ends while we read must not begin again.
            driven = set(self._drivers)
            try:
                for guest in await self._store.guests():
                    if not guest.active_migration or guest.active_migration in driven:
                        continue
                    migration = await self._store.find_migration(guest.active_migration)
                    if migration is not None:
                        await self._adopt(migration)
            except PASSING as error:
                log.warning("the guests can't be read", error=error.message)
            await self._admit()

    async def _adopt(self, migration: Migration) -> None:
        try:
            if state_of(migration) in FINAL or migration.id in self._drivers or migration.id in self._left_alone:
                return
        except ValueError as error:
            log.error("a migration of another release; it waits", migration=migration.id, error=str(error))
            self._left_alone.add(migration.id)
            return
        places = (migration.source, migration.destination)
        missing = sorted({place.host for place in places if place.host not in self._agents})
        if missing:
            await self._leave_alone(migration, missing)
            return
        log.info("adopted", migration=migration.id, state=state_of(migration).name)
        self._start(migration)

    async def _leave_alone(self, migration: Migration, missing: Sequence[str]) -> None:
        """Nothing can be done for it without both agents: the record says what is missing."""
        log.error("a migration's host is not configured any more; it waits", migration=migration.id, missing=missing)
        self._left_alone.add(migration.id)
        hosts = " and ".join(missing)
        changed = Migration()
        changed.CopyFrom(migration)
        changed.waiting_for = (
            f"{hosts} to be in the controllers' configuration (hosts) again; nothing is done until then"
        )
        if changed != migration:
            try:
                await self._store.save(changed)
            except (*PASSING, NotFoundError) as error:
                log.warning("not noted what it waits for", migration=migration.id, error=error.message)

    async def _keep_forgetting(self) -> None:
        """Deletes the records of migrations that have ended long ago."""
        while True:
            await asyncio.sleep(FORGET_EVERY_S)
            try:
                await self._forget_old_ones()
            except PASSING as error:
                log.warning("old migrations not forgotten", error=error.message)

    async def _forget_old_ones(self) -> None:
        keep, now = self._settings.keep_migrations, datetime.now(UTC)
        migrations = await self._store.migrations()
        old = forgettable(migrations, keep, now, self._agents.names(), self._settler.unsettled)
        for migration in old[:FORGOTTEN_AT_ONCE]:
            await self._store.forget(migration)
        for guest in lost_for_long(await self._store.guests(), keep, now):
            await self._store.put_guest(guest)
        if old:
            log.info("old migrations forgotten", count=min(len(old), FORGOTTEN_AT_ONCE))

    async def _planned(self, request: CreateMigrationRequest | CreateUpgradeRequest) -> Migration:
        try:
            return await self._plan(request)
        except NotFoundError:
            # A guest that was started a moment ago is not in the records yet.
            await asyncio.gather(*(self._fleet.look(name) for name in self._agents.names()))
            return await self._plan(request)

    async def _plan(self, request: CreateMigrationRequest | CreateUpgradeRequest) -> Migration:
        if isinstance(request, CreateUpgradeRequest):
            return await self._upgrades.plan(request)
        return await self._planner.plan(request)

    def _is_driven(self, migration_id: str) -> bool:
        return migration_id in self._drivers

    def _moving(self) -> dict[str, Migration]:
        """The migrations whose guests may be on their way, by the guest's UUID."""
        migrations = (driver.migration for driver in self._drivers.values())
        return {each.guest_uuid: each for each in migrations if state_of(each) in ON_THE_WAY}

    def _start(self, migration: Migration) -> None:
        if migration.id in self._drivers:  # adopted while its creator waited for etcd's answer
            return
        self._admitted[migration.id] = asyncio.Event()
        self._drivers[migration.id] = self._driver(migration)
        self._group.create_task(self._drive(migration.id), name=f"migration {migration.id}")

    def _driver(self, migration: Migration) -> Driver:
        return Driver(
            migration,
            self._store,
            self._agents[migration.source.host],
            self._agents[migration.destination.host],
            self._fence,
            self._admitted[migration.id],
            self._volumes,
            self._fencing,
            self._network,
        )

    async def _drive(self, migration_id: str) -> None:
        try:
            await self._drive_to_its_end(migration_id)
        finally:
            del self._drivers[migration_id], self._admitted[migration_id]
        await self._admit()

    async def _drive_to_its_end(self, migration_id: str) -> None:
        """Runs the driver until the state is final; one that failed gives way to a new one, from the record."""
        failed = False
        while True:
            try:
                if failed:
                    migration = await self._store.find_migration(migration_id)
                    if migration is None:
                        log.error("the record of a migration is gone", migration=migration_id)
                        return
                    self._drivers[migration_id] = self._driver(migration)
                await self._drivers[migration_id].run()
                return
            except PASSING as error:
                pause_s = RETRY_S
                log.warning("reading the record again", migration=migration_id, error=error.message)
            except StaleTermError:
                raise
            except Exception:
                pause_s = RETRY_AFTER_BUG_S
                log.exception("the driver failed", migration=migration_id)
            failed = True
            await asyncio.sleep(pause_s)

    async def _admit(self) -> None:
        """Lets those begin whose link is free, and notes in the others' records what they wait for."""
        admitted = {migration_id for migration_id, event in self._admitted.items() if event.is_set()}
        migrations = [driver.migration for driver in self._drivers.values()]
        verdicts = admit(migrations, self._settings.admission, admitted)
        for migration_id, verdict in verdicts.items():
            if verdict.admitted:
                self._admitted[migration_id].set()
        for migration_id, verdict in verdicts.items():
            driver = self._drivers.get(migration_id)
            if driver is None or verdict.admitted:
                continue
            try:
                await driver.wait_for(verdict.reason)
            except PASSING as error:
                log.warning("not noted what it waits for", migration=migration_id, error=error.message)
