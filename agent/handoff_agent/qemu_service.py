"""QemuService: the domains of the host, and the leader's calls to both sides of a handoff."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import Final, TypeAlias, TypeVar

import grpc.aio

from handoff.agent.v1 import qemu_pb2 as pb
from handoff.agent.v1 import qemu_pb2_grpc
from handoff.agent.v1 import types_pb2 as types
from handoff_agent.convergence import ConvergenceSettings
from handoff_agent.handoffs import Handoffs
from handoff_agent.inventory import Inventory
from handoff_agent.order_age import check_age, clock_ms
from handoff_agent.rules import FINAL_STATES, Call

DEFAULT_DOWNTIME_LIMIT_MS: Final = 300
DEFAULT_SWITCH_DEADLINE_S: Final = 2.0
PROGRESS_INTERVAL_S: Final = 0.5

T = TypeVar("T")
Context: TypeAlias = grpc.aio.ServicerContext


class QemuService(qemu_pb2_grpc.QemuServiceServicer):
    """Serves all of QemuService."""

    def __init__(self, inventory: Inventory, handoffs: Handoffs) -> None:
        self._inventory = inventory
        self._handoffs = handoffs
        self._running: set[asyncio.Task[object]] = set()

    async def finish(self) -> None:
        """Waits for the calls that are being carried out, whether or not their callers still wait."""
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _to_the_end(self, work: Coroutine[None, None, T]) -> T:
        """Carries a call out even if its caller goes away or runs out of time: half of it would help nobody."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def ListDomains(  # noqa: N802
        self, request: pb.ListDomainsRequest, context: "Context[pb.ListDomainsRequest, pb.ListDomainsResponse]"
    ) -> pb.ListDomainsResponse:
        """All domains of all connected slots."""
        domains = await self._inventory.domains()
        return pb.ListDomainsResponse(domains=[self._with_migration(domain) for domain in domains])

    async def GetDomain(  # noqa: N802
        self, request: pb.GetDomainRequest, context: "Context[pb.GetDomainRequest, pb.GetDomainResponse]"
    ) -> pb.GetDomainResponse:
        """One domain."""
        return pb.GetDomainResponse(domain=self._with_migration(await self._inventory.domain(request.uuid)))

    def _with_migration(self, domain: types.Domain) -> types.Domain:
        domain.migration_id = self._handoffs.migration_of(domain.uuid)
        return domain

    async def GetHandoff(  # noqa: N802
        self, request: pb.GetHandoffRequest, context: "Context[pb.GetHandoffRequest, pb.GetHandoffResponse]"
    ) -> pb.GetHandoffResponse:
        """One handoff."""
        return pb.GetHandoffResponse(handoff=self._handoffs.get(request.migration_id, request.role).to_message())

    async def ListHandoffs(  # noqa: N802
        self, request: pb.ListHandoffsRequest, context: "Context[pb.ListHandoffsRequest, pb.ListHandoffsResponse]"
    ) -> pb.ListHandoffsResponse:
        """All handoffs."""
        return pb.ListHandoffsResponse(handoffs=[handoff.to_message() for handoff in self._handoffs.all()])

    async def WatchHandoff(  # noqa: N802
        self, request: pb.WatchHandoffRequest, context: "Context[pb.WatchHandoffRequest, pb.WatchHandoffResponse]"
    ) -> AsyncIterator[pb.WatchHandoffResponse]:
        """The handoff at each change of state, and twice a second while it may change."""
        handoff = self._handoffs.get(request.migration_id, request.role)
        sent: pb.Handoff | None = None
        while True:
            change = handoff.next_change()
            message = handoff.to_message()
            if message != sent:
                sent = pb.Handoff()
                sent.CopyFrom(message)
                message.clock_ms = clock_ms()
                yield pb.WatchHandoffResponse(handoff=message)
            if message.state in FINAL_STATES:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(PROGRESS_INTERVAL_S):
                    await change.wait()

    async def PrepareSource(  # noqa: N802
        self, request: pb.PrepareSourceRequest, context: "Context[pb.PrepareSourceRequest, pb.PrepareSourceResponse]"
    ) -> pb.PrepareSourceResponse:
        """Checks the guest and begins the source's side."""
        await self._handoffs.admit(request.fence)
        handoff, guest = await self._to_the_end(
            self._handoffs.prepare_source(
                request.migration_id,
                request.domain_uuid,
                validate_only=request.validate_only,
                local=request.local,
                disks=request.disks,
            )
        )
        return pb.PrepareSourceResponse(handoff=handoff, guest=guest)

    async def PrepareDestination(  # noqa: N802
        self,
        request: pb.PrepareDestinationRequest,
        context: "Context[pb.PrepareDestinationRequest, pb.PrepareDestinationResponse]",
    ) -> pb.PrepareDestinationResponse:
        """Creates the waiting domain."""
        await self._handoffs.admit(request.fence)
        return await self._to_the_end(
            self._handoffs.prepare_destination(
                request.migration_id,
                request.guest,
                request.slot,
                validate_only=request.validate_only,
                method=request.method,
                emulator=request.emulator,
                fast=request.fast,
                bandwidth_bytes_per_s=request.bandwidth_bytes_per_s,
            )
        )

    async def StartTransfer(  # noqa: N802
        self, request: pb.StartTransferRequest, context: "Context[pb.StartTransferRequest, pb.StartTransferResponse]"
    ) -> pb.StartTransferResponse:
        """Begins the copy."""
        await self._handoffs.admit(request.fence)
        source = self._handoffs.source(request.migration_id, Call.START_TRANSFER)
        limits = request.limits
        deadline_s = limits.switch_deadline.ToTimedelta().total_seconds()
        await self._to_the_end(
            source.start_transfer(
                request.uri,
                ConvergenceSettings(limits.downtime_limit_ms or DEFAULT_DOWNTIME_LIMIT_MS),
                limits.bandwidth_bytes_per_s,
                deadline_s or DEFAULT_SWITCH_DEADLINE_S,
                request.disks,
                request.tunnel_address,
            )
        )
        return pb.StartTransferResponse(handoff=source.to_message())

    async def SwitchOver(  # noqa: N802
        self, request: pb.SwitchOverRequest, context: "Context[pb.SwitchOverRequest, pb.SwitchOverResponse]"
    ) -> pb.SwitchOverResponse:
        """Lets QEMU pause the guest."""
        await self._handoffs.admit(request.fence)
        source = self._handoffs.source(request.migration_id, Call.SWITCH_OVER)
        await self._to_the_end(source.switch_over())
        return pb.SwitchOverResponse(handoff=source.to_message())

    async def Activate(  # noqa: N802
        self, request: pb.ActivateRequest, context: "Context[pb.ActivateRequest, pb.ActivateResponse]"
    ) -> pb.ActivateResponse:
        """Runs the guest here."""
        await self._handoffs.admit(request.fence)
        check_age(request.heard_clock_ms, clock_ms())
        destination = self._handoffs.destination(request.migration_id, Call.ACTIVATE)
        await self._to_the_end(destination.activate(keep_paused=request.keep_paused))
        return pb.ActivateResponse(handoff=destination.to_message())

    async def ReleaseSource(  # noqa: N802
        self, request: pb.ReleaseSourceRequest, context: "Context[pb.ReleaseSourceRequest, pb.ReleaseSourceResponse]"
    ) -> pb.ReleaseSourceResponse:
        """Destroys the held copy."""
        await self._handoffs.admit(request.fence)
        source = self._handoffs.source(request.migration_id, Call.RELEASE)
        await self._to_the_end(source.release(keep_disks=request.keep_disks))
        return pb.ReleaseSourceResponse(handoff=source.to_message())

    async def FinalizeDestination(  # noqa: N802
        self,
        request: pb.FinalizeDestinationRequest,
        context: "Context[pb.FinalizeDestinationRequest, pb.FinalizeDestinationResponse]",
    ) -> pb.FinalizeDestinationResponse:
        """Makes the definition persistent."""
        await self._handoffs.admit(request.fence)
        destination = self._handoffs.destination(request.migration_id, Call.FINALIZE)
        await self._to_the_end(destination.finalize())
        return pb.FinalizeDestinationResponse(handoff=destination.to_message())

    async def AbortHandoff(  # noqa: N802
        self, request: pb.AbortHandoffRequest, context: "Context[pb.AbortHandoffRequest, pb.AbortHandoffResponse]"
    ) -> pb.AbortHandoffResponse:
        """Undoes one side."""
        await self._handoffs.admit(request.fence)
        handoff = await self._to_the_end(
            self._handoffs.abort(request.migration_id, request.role, request.reason, fenced=request.fenced)
        )
        return pb.AbortHandoffResponse(handoff=handoff)
