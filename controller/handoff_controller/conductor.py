"""The leader's work: one driver for each migration that is not final, admission, and the look at the fleet."""

import asyncio

import structlog

from handoff.agent.v1.types_pb2 import Fence
from handoff.controller.v1.migrations_pb2 import CreateMigrationRequest, Migration
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
from handoff_controller.driver import Driver
from handoff_controller.etcd.client import EtcdClient
from handoff_controller.etcd.election import Leadership
from handoff_controller.fleet import Fleet
from handoff_controller.machine import FINAL, state_of
from handoff_controller.planner import Planner
from handoff_controller.settings import ControllerSettings
from handoff_controller.settle import Settler
from handoff_controller.store import Store

log = structlog.get_logger()

RETRY_S = 0.5
RETRY_AFTER_BUG_S = 5.0


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
        self._fleet = Fleet(agents, self._store, Settler(self._store, self._fence, self._is_driven))
        self._drivers: dict[str, Driver] = {}
        self._admitted: dict[str, asyncio.Event] = {}
        self._group = asyncio.TaskGroup()

    async def run(self) -> None:
        """Adopts what is in flight and works until cancelled. Raises StaleTermError when we don't lead any more."""
        async with self._group:
            for migration in await self._store.migrations():
                if state_of(migration) in FINAL:
                    continue
                if any(place.host not in self._agents for place in (migration.source, migration.destination)):
                    log.error("a migration's host is not configured any more; it waits", migration=migration.id)
                else:
                    log.info("adopted", migration=migration.id, state=state_of(migration).name)
                    self._start(migration)
            await self._admit()
            await self._fleet.run()

    async def create(self, request: CreateMigrationRequest) -> Migration:
        """Plans, records and starts a migration; see CreateMigration for what it raises."""
        if request.request_id:
            try:
                known = await self._store.migration(request.request_id)
            except NotFoundError:
                pass
            else:
                if known.id == request.request_id:
                    return known
        migration = await self._store.create(await self._planned(request))
        self._start(migration)
        await self._admit()
        return migration

    async def cancel(self, beginning: str) -> Migration:
        """Asks for the abort. Raises NotFoundError, or PreconditionError when the migration is past the commit."""
        migration = await self._store.migration(beginning)
        driver = self._drivers.get(migration.id)
        if driver is not None:
            return await driver.cancel()
        if state_of(migration) in FINAL:
            raise PreconditionError(f"migration {migration.id} is {state_of(migration).name} already")
        raise UnavailableError(f"migration {migration.id} is just being taken over; try again")

    async def _planned(self, request: CreateMigrationRequest) -> Migration:
        try:
            return await self._planner.plan(request)
        except NotFoundError:
            # A guest that was started a moment ago is not in the records yet.
            await asyncio.gather(*(self._fleet.look(name) for name in self._agents.names()))
            return await self._planner.plan(request)

    def _is_driven(self, migration_id: str) -> bool:
        return migration_id in self._drivers

    def _start(self, migration: Migration) -> None:
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
        )

    async def _drive(self, migration_id: str) -> None:
        try:
            while True:
                pause_s = RETRY_S
                try:
                    await self._drivers[migration_id].run()
                    return
                except (ConflictError, UnavailableError, DeadlineError) as error:
                    log.warning("reading the record again", migration=migration_id, error=error.message)
                except StaleTermError:
                    raise
                except Exception:
                    pause_s = RETRY_AFTER_BUG_S
                    log.exception("the driver failed", migration=migration_id)
                await asyncio.sleep(pause_s)
                await self._reload(migration_id)
        finally:
            self._drivers.pop(migration_id, None)
            self._admitted.pop(migration_id, None)
            if self.leadership.valid():
                await self._admit()

    async def _reload(self, migration_id: str) -> None:
        while True:
            try:
                self._drivers[migration_id] = self._driver(await self._store.migration(migration_id))
                return
            except (UnavailableError, DeadlineError) as error:
                log.warning("the record can't be read", migration=migration_id, error=error.message)

    async def _admit(self) -> None:
        """Lets those begin whose link is free, and notes in the others' records what they wait for."""
        verdicts = admit([driver.migration for driver in self._drivers.values()], self._settings.admission)
        for migration_id, verdict in verdicts.items():
            if verdict.admitted:
                self._admitted[migration_id].set()
            elif not self._admitted[migration_id].is_set():
                await self._drivers[migration_id].wait_for(verdict.reason)
