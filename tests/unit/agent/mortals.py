"""Real agents that die when a test says so and are back at once, and a leader without etcd who moves guests by them."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import mortal_agent
from builds import Builds
from processes import processes_with

from handoff.agent.v1.qemu_pb2 import Handoff, HandoffRole, HandoffState, TransferProgress
from handoff.agent.v1.types_pb2 import Fence
from handoff.controller.v1.migrations_pb2 import Migration
from handoff_agent.events import LifecycleEvent, MonitorEvent, Subscription
from handoff_agent.rules import FINAL_STATES
from handoff_common.errors import HandoffError
from handoff_controller.agents import GrpcAgent
from handoff_controller.driver import Driver
from handoff_controller.fencing import FenceCommand
from handoff_controller.machine import State, state_of
from handoff_controller.settings import FencingSettings
from handoff_controller.volumes import Volumes

FENCE = Fence(term=1, leader="test")


class MortalAgent:
    """The agent of a host, one life after the other. The next one waits with all that it imports."""

    def __init__(
        self, name: str, slots: Mapping[str, str], builds: Builds, directory: Path, first_port: int, disks: str = ""
    ) -> None:
        """`slots`: URIs by name. `disks`: the format that local disks have here, if not the one that they had."""
        self.directory = directory
        self.images = directory / "images"
        self.address = f"unix:{directory}/agent.sock"
        self._config = directory / "agent.toml"
        self.images.mkdir(parents=True)
        lines = [
            f'name = "{name}"',
            f'listen = ["{self.address}"]',
            'migration_address = "127.0.0.1"',
            f"migration_ports = [{first_port}, {first_port + 15}]",
            f'state_dir = "{directory}"',
            f'runtime_dir = "{directory}/run"',
            f'ovs_database = "unix:{directory}/no-ovs"',
            "memory_mib = 1024",
            f'[host_types.standard]\nfolder = "{self.images}"\nformat = "{disks}"',
            *(f'[slots.{slot}]\nuri = "{uri}"' for slot, uri in slots.items()),
            *(f'[[emulators]]\nname = "{each}"\npath = "{builds.paths[each]}"' for each in ("old", "new")),
        ]
        self._config.write_text("\n".join(lines))

    @contextlib.asynccontextmanager
    async def living(self) -> AsyncIterator["MortalAgent"]:
        """It lives, again and again, for as long as the context lasts."""
        lives = asyncio.create_task(self._live())
        try:
            yield self
        finally:
            lives.cancel()
            await asyncio.wait({lives})
        if not lives.cancelled():
            lives.result()

    async def _live(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            spare = await self._wait_ready(stack)
            while True:
                life = spare
                assert life.stdin is not None
                life.stdin.write(b"\n")
                spare = await self._wait_ready(stack)
                await life.wait()

    async def _wait_ready(self, stack: contextlib.AsyncExitStack) -> asyncio.subprocess.Process:
        """One that is to live next. It ends with the test run, also one that is killed."""
        with (self.directory / "log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *("setpriv", "--pdeathsig", "KILL", sys.executable, mortal_agent.__file__, str(self._config)),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
            )

        async def end() -> None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

        stack.push_async_callback(end)
        return process

    def dies_at(self, write: str, *, fails_then: bool) -> None:
        """Such as "source HELD.1 before"; see mortal_agent.py."""
        if fails_then:
            (self.directory / "fails-then").touch()
        (self.directory / "dies-at").write_text(write)

    def forget(self) -> None:
        """It dies no more, nor fails."""
        for name in ("dies-at", "fails-then", "fails"):
            (self.directory / name).unlink(missing_ok=True)

    async def serves(self) -> None:
        """Returns when it does."""
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(HandoffError):
                    await self._handoffs()
                    return
                await asyncio.sleep(0.05)

    async def unsettled(self, migration_id: str) -> list[str]:
        """Its sides of a migration that have not ended."""
        handoffs = await self._handoffs()
        return [str(one) for one in handoffs if one.migration_id == migration_id and one.state not in FINAL_STATES]

    async def _handoffs(self) -> Sequence[Handoff]:
        agent = GrpcAgent("it", self.address)
        try:
            return await agent.list_handoffs()
        finally:
            await agent.close()

    def leftovers(self) -> list[str]:
        """Folders of upgrades and of storage daemons, and those themselves; marks of images."""
        folders = [str(found) for found in (self.directory / "run").glob("*/*")]
        daemons = [str(pid) for pid in processes_with(str(self.directory / "run/storage"))]
        return [*folders, *daemons, *map(str, self.images.glob(".*"))]

    def disks(self) -> list[Path]:
        """The images that are here."""
        return sorted(self.images.glob("[!.]*"))

    @property
    def is_to_die(self) -> bool:
        return (self.directory / "dies-at").exists()

    async def notes(self, migration_id: str, write: str) -> None:
        """Returns when it has written this, or is dead."""
        armed = self.is_to_die
        async with asyncio.timeout(20):
            while True:
                if write in self.writes(migration_id) or self.is_to_die is not armed:
                    return
                await asyncio.sleep(0.01)

    def writes(self, migration_id: str) -> list[str]:
        """What its ledger has written of a migration, in order."""
        lines = [line.partition(" ") for line in (self.directory / "writes").read_text().splitlines()]
        return [write for migration, _, write in lines if migration == migration_id]


class Listening(GrpcAgent):
    """Tells the test of each state before the leader hears of it."""

    def __init__(self, name: str, address: str, hears: Callable[["HandoffState.ValueType"], Awaitable[None]]) -> None:
        super().__init__(name, address)
        self._hears = hears

    async def watch(self, migration_id: str, role: "HandoffRole.ValueType") -> AsyncGenerator[Handoff, None]:
        async with contextlib.aclosing(super().watch(migration_id, role)) as states:
            async for handoff in states:
                await self._hears(handoff.state)
                yield handoff


class Leader:
    """The controllers' own driver of a migration, with its record in memory."""

    def __init__(
        self,
        migration: Migration,
        source: MortalAgent,
        destination: MortalAgent,
        entered: Callable[[State], Awaitable[None]],
        *,
        cancels: bool,
    ) -> None:
        """`entered` is awaited when a state is in the record. `cancels`: when the source is HELD."""
        self._entered = entered
        self._cancels = cancels
        self._state = state_of(migration)
        self._migration = migration
        self._agents = [
            Listening(migration.source.host, source.address, self._hear),
            Listening(migration.destination.host, destination.address, self._hear),
        ]
        admitted = asyncio.Event()
        admitted.set()
        self._driver = Driver(
            migration, self, *self._agents, FENCE, admitted, Volumes(()), FenceCommand(FencingSettings())
        )

    async def run(self) -> Migration:
        """Goes on to the end."""
        try:
            return await self._driver.run()
        finally:
            await asyncio.gather(*(agent.close() for agent in self._agents))

    async def _hear(self, state: "HandoffState.ValueType") -> None:
        if self._cancels and state == HandoffState.HANDOFF_STATE_HELD:
            self._cancels = False
            await self._driver.cancel()

    async def save(self, migration: Migration) -> Migration:
        """As Store.save."""
        saved = Migration()
        saved.CopyFrom(migration)
        saved.revision += 1
        if state_of(saved) is not self._state:
            self._state = state_of(saved)
            await self._entered(self._state)
        return saved

    async def put_progress(self, migration_id: str, progress: TransferProgress) -> None:
        """As Store.put_progress."""


class Runs:
    """When a copy of a guest ran, by QEMU's own word and clock (seconds since the epoch)."""

    def __init__(self, events: Subscription, *, began: float | None = None) -> None:
        """`began`: it runs already."""
        self._events = events
        self._began = began
        self._over: list[tuple[float, float]] = []

    async def all(self) -> list[tuple[float, float]]:
        """Every run so far, from and to."""
        while (event := await self._events.next_within(0.05)) is not None:
            match event:
                case MonitorEvent(event="RESUME", time_s=time_s):
                    self._began = self._began or time_s
                case MonitorEvent(event="STOP", time_s=time_s):
                    self._end(time_s)
                case LifecycleEvent(kind="stopped" | "crashed"):
                    self._end(time.time())
        return [*self._over, *([(self._began, time.time())] if self._began is not None else [])]

    def _end(self, time_s: float) -> None:
        if self._began is not None:
            self._over.append((self._began, time_s))
        self._began = None
