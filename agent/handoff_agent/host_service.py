"""HostService: what this hypervisor is, and what happens on it."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import ExitStack, suppress
from importlib.metadata import version
from typing import Final

import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp
from lxml import etree

from handoff.agent.v1 import host_pb2, host_pb2_grpc
from handoff.agent.v1 import types_pb2 as types
from handoff_agent.builds import Build
from handoff_agent.emulators import Emulators
from handoff_agent.events import ConnectionEvent, Event, LifecycleEvent
from handoff_agent.guests import domain_state
from handoff_agent.handoff_changes import HandoffChanges
from handoff_agent.inventory import Inventory
from handoff_agent.settings import AgentSettings
from handoff_agent.slots import Hypervisor, Slot
from handoff_common.errors import HandoffError, NotFoundError, UnavailableError

# What the kind of an event says of the state; after the others the domain is asked ("started" may be paused).
_STATE_AFTER: Final = {
    "resumed": types.DOMAIN_STATE_RUNNING,
    "suspended": types.DOMAIN_STATE_PAUSED,
    "stopped": types.DOMAIN_STATE_SHUT_OFF,
}
_INACTIVE: Final = (types.DOMAIN_STATE_SHUT_OFF, types.DOMAIN_STATE_UNSPECIFIED)


def free_memory_bytes(total_bytes: int, domains: Iterable[types.Domain]) -> int:
    """Memory that is not promised to a domain: an active one may use all of its own at any time."""
    promised = sum(domain.memory_bytes for domain in domains if domain.state not in _INACTIVE)
    return max(0, total_bytes - promised)


class HostService(host_pb2_grpc.HostServiceServicer):
    """Serves GetHost and WatchEvents."""

    def __init__(
        self,
        settings: AgentSettings,
        hypervisor: Hypervisor,
        emulators: Emulators,
        inventory: Inventory,
        changes: HandoffChanges,
        term: Callable[[], int],
    ) -> None:
        """`term` tells the highest term that the agent has seen."""
        self._settings = settings
        self._hypervisor = hypervisor
        self._emulators = emulators
        self._inventory = inventory
        self._changes = changes
        self._term = term
        self._cpu_model = ""
        self._start_time = _now()

    async def GetHost(  # noqa: N802
        self,
        request: host_pb2.GetHostRequest,
        context: grpc.aio.ServicerContext[host_pb2.GetHostRequest, host_pb2.GetHostResponse],
    ) -> host_pb2.GetHostResponse:
        """The host as it is now. DEADLINE_EXCEEDED when a connected libvirtd does not answer."""
        settings = self._settings
        total_bytes = settings.guest_memory_bytes()
        host = host_pb2.Host(
            name=settings.name,
            slots=[_slot_message(slot) for slot in self._hypervisor.slots],
            emulators=[_emulator_message(build) for build in self._emulators.builds],
            memory_bytes=total_bytes,
            memory_free_bytes=free_memory_bytes(total_bytes, await self._inventory.domains()),
            cpus=os.cpu_count() or 0,
            cpu_model=await self._host_cpu_model(),
            migration_address=settings.migration_address,
            shared_paths=settings.shared_paths,
            term=self._term(),
            agent_version=version("handoff"),
            start_time=self._start_time,
            tunnel_address=str(settings.network.tunnel_address) if settings.network else "",
        )
        return host_pb2.GetHostResponse(host=host)

    async def WatchEvents(  # noqa: N802
        self,
        request: host_pb2.WatchEventsRequest,
        context: grpc.aio.ServicerContext[host_pb2.WatchEventsRequest, host_pb2.WatchEventsResponse],
    ) -> AsyncIterator[host_pb2.WatchEventsResponse]:
        """Domain and handoff events, until the client leaves. UNAVAILABLE when a slot's connection comes or goes:
        events were lost then, and the client has to list again."""
        arrived: asyncio.Queue[Event | str] = asyncio.Queue()
        with ExitStack() as stack:
            sources: list[Callable[[], Awaitable[Event | str]]] = [
                *(stack.enter_context(slot.events()).next for slot in self._hypervisor.slots),
                stack.enter_context(self._changes.listen()).get,
            ]
            pumps = [asyncio.create_task(_pump(source, arrived)) for source in sources]
            try:
                yield host_pb2.WatchEventsResponse(time=_now())
                while True:
                    message = await self._message(await arrived.get())
                    if message is not None:
                        yield message
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)

    async def _message(self, event: Event | str) -> host_pb2.WatchEventsResponse | None:
        match event:
            case str():
                return host_pb2.WatchEventsResponse(time=_now(), handoff_migration_id=event)
            case ConnectionEvent(slot=slot, connected=connected):
                change = "has its libvirtd again" if connected else "lost its libvirtd"
                raise UnavailableError(f"host {self._settings.name}: slot {slot} {change}; list again")
            case LifecycleEvent():
                domain = host_pb2.DomainEvent(
                    uuid=event.uuid,
                    name=event.name,
                    slot=event.slot,
                    kind=event.kind,
                    state=await self._state_after(event),
                )
                return host_pb2.WatchEventsResponse(time=_now(), domain=domain)
            case _:
                return None

    async def _state_after(self, event: LifecycleEvent) -> types.DomainState.ValueType:
        if (state := _STATE_AFTER.get(event.kind)) is not None:
            return state
        try:
            slot = self._hypervisor.slot(event.slot)
            number, _reason = await slot.on_domain(event.uuid, lambda domain: domain.state())
        except NotFoundError:
            return types.DOMAIN_STATE_UNSPECIFIED
        return domain_state(number)

    async def _host_cpu_model(self) -> str:
        """Read once: it does not change while the host runs."""
        for slot in self._hypervisor.slots:
            if self._cpu_model or not slot.connected:
                continue
            with suppress(HandoffError):
                capabilities = await slot.call(lambda connection: connection.getCapabilities())
                self._cpu_model = etree.fromstring(capabilities.encode()).findtext("host/cpu/model", "")
        return self._cpu_model


async def _pump(source: Callable[[], Awaitable[Event | str]], arrived: "asyncio.Queue[Event | str]") -> None:
    while True:
        arrived.put_nowait(await source())


def _slot_message(slot: Slot) -> host_pb2.Slot:
    return host_pb2.Slot(
        name=slot.name, connected=slot.connected, host_uuid=slot.host_uuid, libvirt_version=slot.libvirt_version
    )


def _emulator_message(build: Build) -> host_pb2.Emulator:
    return host_pb2.Emulator(
        path=build.path,
        release=build.release,
        name=build.name,
        machine_types=sorted(build.machine_types),
        cpr=build.cpr,
    )


def _now() -> Timestamp:
    now = Timestamp()
    now.GetCurrentTime()
    return now
