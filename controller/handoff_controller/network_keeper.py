"""Tells every host where the tenants' ports are: whenever that changes, and again where it was not heard."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Final

import structlog

from handoff.agent.v1.types_pb2 import Fence
from handoff.controller.v1.hosts_pb2 import Host, HostState
from handoff.controller.v1.migrations_pb2 import Migration
from handoff_common.errors import HandoffError
from handoff_controller.agents import Agents
from handoff_controller.network import FabricPort, FabricView, told_to
from handoff_controller.store import Store

log = structlog.get_logger()

LOOK_EVERY_S: Final = 3.0
# Agents keep what they were told; this is for one whose disk was replaced.
TELL_AGAIN_S: Final = 60.0
POINTING_TIMEOUT_S: Final = 3.0


class NetworkKeeper:
    """The leader's voice in matters of the network. `run` it as a task."""

    def __init__(
        self,
        agents: Agents,
        store: Store,
        fence: Fence,
        view: FabricView,
        moving: Callable[[], Mapping[str, Migration]],
    ) -> None:
        """`moving` gives the migrations that are under way, by the guest's UUID."""
        self._agents = agents
        self._store = store
        self._fence = fence
        self._view = view
        self._moving = moving
        self._ports: tuple[FabricPort, ...] = ()
        self._generation = 0
        self._knows_all = False
        self._heard: dict[str, tuple[int, float]] = {}
        self._wake = asyncio.Event()
        self._reading = asyncio.Lock()
        self._telling: dict[str, asyncio.Lock] = {}
        self._being_told: set[str] = set()

    def look_again(self) -> None:
        """Something may have changed."""
        self._wake.set()

    async def run(self) -> None:
        """Looks and tells, for ever. No host waits for another one that does not answer."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._wake.clear()
                try:
                    hosts = await self._read()
                except HandoffError as error:
                    log.warning("the network can't be told", error=error.message)
                else:
                    if self._knows_all:
                        for host in hosts:
                            self._begin_to_tell(group, host)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_EVERY_S):
                        await self._wake.wait()

    def _begin_to_tell(self, group: asyncio.TaskGroup, host: Host) -> None:
        if not self._is_due(host) or host.name in self._being_told:
            return
        self._being_told.add(host.name)
        group.create_task(self._tell_newest(host), name=f"network of {host.name}")

    async def _tell_newest(self, host: Host) -> None:
        told = self._generation
        try:
            await self._tell(host)
        finally:
            self._being_told.discard(host.name)
        if told != self._generation:
            self.look_again()

    async def point(self) -> str:
        """Tells all hosts at once what the records say now. Returns who has not heard it; that is told later."""
        hosts = await self._read()
        up = [host for host in hosts if host.state != HostState.HOST_STATE_DOWN]
        heard = await asyncio.gather(*(self._tell_in_time(host) for host in up))
        missing = [host.name for host, ok in zip(up, heard, strict=True) if not ok]
        return ", ".join([*missing, *(host.name for host in hosts if host not in up)])

    async def _read(self) -> list[Host]:
        """The hosts that manage flows; what they are to be told is read, too."""
        async with self._reading:
            hosts = [host for host in await self._store.hosts() if host.name in self._agents]
            # A host that nobody has looked at yet may have guests, whom nobody must be told to forget.
            self._knows_all = len(hosts) == len(self._agents.names())
            ports = self._view.ports(hosts, await self._store.guests(), self._moving())
            if ports != self._ports or not self._generation:
                self._ports = ports
                self._generation += 1
            return [host for host in hosts if host.detail.tunnel_address]

    def _is_due(self, host: Host) -> bool:
        generation, at = self._heard.get(host.name, (0, 0.0))
        too_long_ago = asyncio.get_running_loop().time() - at > TELL_AGAIN_S
        return host.state != HostState.HOST_STATE_DOWN and (generation != self._generation or too_long_ago)

    async def _tell_in_time(self, host: Host) -> bool:
        try:
            async with asyncio.timeout(POINTING_TIMEOUT_S):
                return await self._tell(host)
        except TimeoutError:
            return False

    async def _tell(self, host: Host) -> bool:
        async with self._telling.setdefault(host.name, asyncio.Lock()):
            generation = self._generation
            if self._heard.get(host.name, (0, 0.0))[0] == generation and not self._is_due(host):
                return True
            ports = told_to(host.detail.tunnel_address, self._ports)
            try:
                applied = await self._agents[host.name].set_network(self._fence, generation, ports)
            except HandoffError as error:
                log.warning("a host was not told of the network", host=host.name, error=error.message)
                return False
            self._heard[host.name] = (generation, asyncio.get_running_loop().time())
            log.debug("network told", host=host.name, generation=generation, applied=applied)
            return applied
