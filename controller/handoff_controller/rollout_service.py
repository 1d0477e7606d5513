"""The RPCs of rollouts. As in services.py: every replica reads, the leader writes."""

from collections.abc import AsyncIterator

from handoff.controller.v1 import rollouts_pb2_grpc
from handoff.controller.v1.rollouts_pb2 import (
    CancelRolloutRequest,
    CancelRolloutResponse,
    CreateRolloutRequest,
    CreateRolloutResponse,
    GetRolloutRequest,
    GetRolloutResponse,
    ListRolloutsRequest,
    ListRolloutsResponse,
    WatchRolloutRequest,
    WatchRolloutResponse,
)
from handoff.controller.v1.rollouts_pb2_grpc import RolloutsServiceStub
from handoff_controller.rollout import FINAL, phase_of
from handoff_controller.services import Context, LeaderLink
from handoff_controller.store import Reader


class RolloutsService(rollouts_pb2_grpc.RolloutsServiceServicer):
    """Rollouts: see rollouts.proto."""

    def __init__(self, reader: Reader, link: LeaderLink) -> None:
        self._reader = reader
        self._link = link

    async def CreateRollout(self, request: CreateRolloutRequest, context: Context) -> CreateRolloutResponse:  # noqa: N802
        """Leader only."""
        if (conductor := self._link.leading()) is not None:
            return CreateRolloutResponse(rollout=await conductor.rollouts.create(request))
        return await self._link.forward_through(
            context,
            lambda channel, timeout, via: RolloutsServiceStub(channel).CreateRollout(
                request, timeout=timeout, metadata=via
            ),
        )

    async def CancelRollout(self, request: CancelRolloutRequest, context: Context) -> CancelRolloutResponse:  # noqa: N802
        """Leader only."""
        if (conductor := self._link.leading()) is not None:
            return CancelRolloutResponse(rollout=await conductor.rollouts.cancel(request.id))
        return await self._link.forward_through(
            context,
            lambda channel, timeout, via: RolloutsServiceStub(channel).CancelRollout(
                request, timeout=timeout, metadata=via
            ),
        )

    async def GetRollout(self, request: GetRolloutRequest, context: Context) -> GetRolloutResponse:  # noqa: N802
        """Any replica."""
        return GetRolloutResponse(rollout=await self._reader.rollout(request.id))

    async def ListRollouts(self, request: ListRolloutsRequest, context: Context) -> ListRolloutsResponse:  # noqa: N802
        """Any replica."""
        found = [
            rollout
            for rollout in await self._reader.rollouts()
            if request.host in ("", rollout.host) and not (request.active_only and phase_of(rollout) in FINAL)
        ]
        found.sort(key=lambda rollout: rollout.create_time.ToNanoseconds(), reverse=True)
        return ListRolloutsResponse(rollouts=found)

    async def WatchRollout(self, request: WatchRolloutRequest, context: Context) -> AsyncIterator[WatchRolloutResponse]:  # noqa: N802
        """Any replica."""
        async for rollout in self._reader.watch_rollout(request.id):
            yield WatchRolloutResponse(rollout=rollout)
