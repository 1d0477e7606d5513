"""Calls to the agents: typed, each with its deadline, errors as HandoffError."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import grpc
import grpc.aio

from handoff.agent.v1.disk_pb2 import DiskMove
from handoff.agent.v1.flow_pb2 import GetNetworkRequest, GetNetworkResponse, NetworkPort, SetNetworkRequest
from handoff.agent.v1.flow_pb2_grpc import FlowServiceStub
from handoff.agent.v1.host_pb2 import GetHostRequest, Host, WatchEventsRequest, WatchEventsResponse
from handoff.agent.v1.host_pb2_grpc import HostServiceStub
from handoff.agent.v1.qemu_pb2 import (
    AbortHandoffRequest,
    ActivateRequest,
    FinalizeDestinationRequest,
    Handoff,
    HandoffRole,
    ListDomainsRequest,
    ListHandoffsRequest,
    PrepareDestinationRequest,
    PrepareSourceRequest,
    ReleaseSourceRequest,
    SourceGuest,
    StartTransferRequest,
    SwitchOverRequest,
    TransferLimits,
    TransferMethod,
    WatchHandoffRequest,
)
from handoff.agent.v1.qemu_pb2_grpc import QemuServiceStub
from handoff.agent.v1.types_pb2 import Domain, Fence
from handoff_common.channel import open_channel
from handoff_common.errors import NotFoundError, UnavailableError, from_rpc_error

# Deadlines of one call, in seconds. Those that create or destroy a domain wait for QEMU and libvirt on a busy host.
READ_S = 4.0
ORDER_S = 8.0
DOMAIN_S = 30.0
# WatchHandoff tells progress twice a second: a longer silence means that the agent is frozen or cut off.
WATCH_SILENCE_S = 3.0

Answer = TypeVar("Answer")


class Agent(Protocol):
    """One agent, as the driver of a migration sees it. All orders are idempotent (qemu.proto)."""

    name: str

    async def prepare_source(
        self,
        fence: Fence,
        migration_id: str,
        domain_uuid: str,
        *,
        validate_only: bool = False,
        local: bool = False,
        disks: Sequence[DiskMove] = (),
    ) -> SourceGuest:
        """PrepareSource."""

    async def prepare_destination(
        self,
        fence: Fence,
        migration_id: str,
        guest: SourceGuest,
        slot: str,
        *,
        validate_only: bool = False,
        method: "TransferMethod.ValueType" = TransferMethod.TRANSFER_METHOD_TCP,
        emulator: str = "",
        fast: bool = False,
        bandwidth_bytes_per_s: int = 0,
    ) -> Handoff:
        """PrepareDestination."""

    async def start_transfer(
        self,
        fence: Fence,
        migration_id: str,
        uri: str,
        limits: TransferLimits,
        disks: Sequence[DiskMove] = (),
        tunnel_address: str = "",
    ) -> Handoff:
        """StartTransfer."""

    async def switch_over(self, fence: Fence, migration_id: str) -> Handoff:
        """SwitchOver."""

    async def activate(
        self, fence: Fence, migration_id: str, *, heard_clock_ms: int, keep_paused: bool = False
    ) -> Handoff:
        """Activate."""

    async def release_source(self, fence: Fence, migration_id: str, *, keep_disks: bool = False) -> Handoff:
        """ReleaseSource."""

    async def finalize_destination(self, fence: Fence, migration_id: str) -> Handoff:
        """FinalizeDestination."""

    async def abort(
        self, fence: Fence, migration_id: str, role: "HandoffRole.ValueType", reason: str, *, fenced: bool = False
    ) -> Handoff:
        """AbortHandoff."""

    def watch(self, migration_id: str, role: "HandoffRole.ValueType") -> AsyncGenerator[Handoff, None]:
        """WatchHandoff; raises UnavailableError when the agent falls silent."""

    async def list_domains(self) -> tuple[Domain, ...]:
        """ListDomains."""


class GrpcAgent:
    """The agent at one address. Raises UnavailableError or DeadlineError when it does not answer."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self._channel = open_channel(address)
        self._host = HostServiceStub(self._channel)
        self._qemu = QemuServiceStub(self._channel)
        self._flow = FlowServiceStub(self._channel)

    async def close(self) -> None:
        """Closes the channel; calls under way fail."""
        await self._channel.close()

    async def _answer(self, call: Callable[[], Awaitable[Answer]]) -> Answer:
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, f"agent of {self.name} ({self.address})") from error

    async def get_host(self) -> Host:
        """GetHost."""
        response = await self._answer(lambda: self._host.GetHost(GetHostRequest(), timeout=READ_S))
        return response.host

    async def list_domains(self) -> tuple[Domain, ...]:
        """ListDomains."""
        response = await self._answer(lambda: self._qemu.ListDomains(ListDomainsRequest(), timeout=READ_S))
        return tuple(response.domains)

    async def set_network(self, fence: Fence, generation: int, ports: Sequence[NetworkPort]) -> bool:
        """SetNetwork: whether its switch has it already."""
        request = SetNetworkRequest(fence=fence, generation=generation, ports=ports)
        response = await self._answer(lambda: self._flow.SetNetwork(request, timeout=READ_S))
        return response.applied

    async def get_network(self) -> GetNetworkResponse:
        """GetNetwork."""
        return await self._answer(lambda: self._flow.GetNetwork(GetNetworkRequest(), timeout=READ_S))

    async def list_handoffs(self) -> tuple[Handoff, ...]:
        """ListHandoffs."""
        response = await self._answer(lambda: self._qemu.ListHandoffs(ListHandoffsRequest(), timeout=READ_S))
        return tuple(response.handoffs)

    async def watch_events(self) -> AsyncGenerator[WatchEventsResponse, None]:
        """WatchEvents; raises UnavailableError when the stream breaks."""
        call = self._host.WatchEvents(WatchEventsRequest())
        try:
            async for event in call:
                yield event
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, f"agent of {self.name} ({self.address})") from error
        finally:
            call.cancel()

    async def prepare_source(
        self,
        fence: Fence,
        migration_id: str,
        domain_uuid: str,
        *,
        validate_only: bool = False,
        local: bool = False,
        disks: Sequence[DiskMove] = (),
    ) -> SourceGuest:
        """PrepareSource."""
        request = PrepareSourceRequest(
            fence=fence,
            migration_id=migration_id,
            domain_uuid=domain_uuid,
            validate_only=validate_only,
            local=local,
            disks=disks,
        )
        response = await self._answer(lambda: self._qemu.PrepareSource(request, timeout=DOMAIN_S if disks else ORDER_S))
        return response.guest

    async def prepare_destination(
        self,
        fence: Fence,
        migration_id: str,
        guest: SourceGuest,
        slot: str,
        *,
        validate_only: bool = False,
        method: "TransferMethod.ValueType" = TransferMethod.TRANSFER_METHOD_TCP,
        emulator: str = "",
        fast: bool = False,
        bandwidth_bytes_per_s: int = 0,
    ) -> Handoff:
        """PrepareDestination."""
        request = PrepareDestinationRequest(
            fence=fence,
            migration_id=migration_id,
            guest=guest,
            slot=slot,
            validate_only=validate_only,
            method=method,
            emulator=emulator,
            fast=fast,
            bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        )
        response = await self._answer(lambda: self._qemu.PrepareDestination(request, timeout=DOMAIN_S))
        return response.handoff

    async def start_transfer(
        self,
        fence: Fence,
        migration_id: str,
        uri: str,
        limits: TransferLimits,
        disks: Sequence[DiskMove] = (),
        tunnel_address: str = "",
    ) -> Handoff:
        """StartTransfer."""
        request = StartTransferRequest(
            fence=fence, migration_id=migration_id, uri=uri, limits=limits, disks=disks, tunnel_address=tunnel_address
        )
        response = await self._answer(lambda: self._qemu.StartTransfer(request, timeout=ORDER_S))
        return response.handoff

    async def switch_over(self, fence: Fence, migration_id: str) -> Handoff:
        """SwitchOver."""
        request = SwitchOverRequest(fence=fence, migration_id=migration_id)
        response = await self._answer(lambda: self._qemu.SwitchOver(request, timeout=ORDER_S))
        return response.handoff

    async def activate(
        self, fence: Fence, migration_id: str, *, heard_clock_ms: int, keep_paused: bool = False
    ) -> Handoff:
        """Activate."""
        request = ActivateRequest(
            fence=fence, migration_id=migration_id, heard_clock_ms=heard_clock_ms, keep_paused=keep_paused
        )
        response = await self._answer(lambda: self._qemu.Activate(request, timeout=ORDER_S))
        return response.handoff

    async def release_source(self, fence: Fence, migration_id: str, *, keep_disks: bool = False) -> Handoff:
        """ReleaseSource."""
        request = ReleaseSourceRequest(fence=fence, migration_id=migration_id, keep_disks=keep_disks)
        response = await self._answer(lambda: self._qemu.ReleaseSource(request, timeout=DOMAIN_S))
        return response.handoff

    async def finalize_destination(self, fence: Fence, migration_id: str) -> Handoff:
        """FinalizeDestination."""
        request = FinalizeDestinationRequest(fence=fence, migration_id=migration_id)
        response = await self._answer(lambda: self._qemu.FinalizeDestination(request, timeout=DOMAIN_S))
        return response.handoff

    async def abort(
        self, fence: Fence, migration_id: str, role: "HandoffRole.ValueType", reason: str, *, fenced: bool = False
    ) -> Handoff:
        """AbortHandoff."""
        request = AbortHandoffRequest(fence=fence, migration_id=migration_id, role=role, reason=reason, fenced=fenced)
        response = await self._answer(lambda: self._qemu.AbortHandoff(request, timeout=DOMAIN_S))
        return response.handoff

    async def watch(self, migration_id: str, role: "HandoffRole.ValueType") -> AsyncGenerator[Handoff, None]:
        """WatchHandoff; raises UnavailableError when the stream breaks or falls silent for WATCH_SILENCE_S."""
        call = self._qemu.WatchHandoff(WatchHandoffRequest(migration_id=migration_id, role=role))
        responses = aiter(call)
        try:
            while True:
                async with asyncio.timeout(WATCH_SILENCE_S):
                    response = await anext(responses)
                yield response.handoff
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise UnavailableError(f"agent of {self.name} ({self.address}) is silent") from None
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, f"agent of {self.name} ({self.address})") from error
        finally:
            call.cancel()


class Agents:
    """The agents of the fleet, by host name."""

    def __init__(self, addresses: Mapping[str, str]) -> None:
        self._agents = {name: GrpcAgent(name, address) for name, address in addresses.items()}

    def __getitem__(self, host: str) -> GrpcAgent:
        try:
            return self._agents[host]
        except KeyError:
            known = ", ".join(sorted(self._agents))
            raise NotFoundError(f"no host {host!r}: the controller's configuration knows {known}") from None

    def __contains__(self, host: object) -> bool:
        return host in self._agents

    def names(self) -> tuple[str, ...]:
        """Names of all hosts, sorted."""
        return tuple(sorted(self._agents))

    async def close(self) -> None:
        """Closes every channel."""
        await asyncio.gather(*(agent.close() for agent in self._agents.values()))
