"""The API's rollouts as the command sees them; as client.py."""

from collections.abc import AsyncGenerator

from handoff.controller.v1.rollouts_pb2 import (
    CancelRolloutRequest,
    CreateRolloutRequest,
    GetRolloutRequest,
    ListRolloutsRequest,
    ListRolloutsResponse,
    Rollout,
    WatchRolloutRequest,
)
from handoff.controller.v1.rollouts_pb2_grpc import RolloutsServiceStub
from handoff_cli.failover import Failover
from handoff_cli.newest import newest
from handoff_cli.states import is_ended
from handoff_common.errors import HandoffError, PreconditionError


class RolloutClient:
    """All methods raise what Failover's do."""

    def __init__(self, failover: Failover) -> None:
        self._failover = failover

    async def rollouts(self, host: str = "", *, active_only: bool = False) -> ListRolloutsResponse:
        """The rollouts, newest first."""
        request = ListRolloutsRequest(host=host, active_only=active_only)
        return await self._failover.read(
            lambda channel, s: RolloutsServiceStub(channel).ListRollouts(request, timeout=s)
        )

    async def rollout(self, beginning: str) -> Rollout:
        """One rollout, by its id or an unambiguous beginning of it."""
        request = GetRolloutRequest(id=beginning)
        response = await self._failover.read(
            lambda channel, s: RolloutsServiceStub(channel).GetRollout(request, timeout=s)
        )
        return response.rollout

    async def create(self, request: CreateRolloutRequest) -> Rollout:
        """Starts a rollout. `request` must carry a request_id; then this may be called again at will.

        Raises PreconditionError when that id belongs to another host's rollout.
        """
        assert request.request_id
        try:
            response = await self._failover.write(
                lambda channel, s: RolloutsServiceStub(channel).CreateRollout(request, timeout=s)
            )
        except PreconditionError:
            # An unanswered try of ours may be the rollout that stands in the way.
            created = await self._created(request.request_id)
            if created is None:
                raise
        else:
            created = response.rollout
        if created.host != request.host:
            raise PreconditionError(f"request id {created.id} belongs to the rollout of {created.host}; choose another")
        return created

    async def _created(self, request_id: str) -> Rollout | None:
        try:
            found = await self.rollout(request_id)
        except HandoffError:
            return None
        return found if found.id == request_id else None

    async def cancel(self, beginning: str) -> Rollout:
        """Asks to begin no more guests."""
        request = CancelRolloutRequest(id=beginning)
        response = await self._failover.write(
            lambda channel, s: RolloutsServiceStub(channel).CancelRollout(request, timeout=s)
        )
        return response.rollout

    def watch(self, beginning: str) -> AsyncGenerator[Rollout, None]:
        """The rollout as it is now, then as it changes, the final state last; never an older one than before."""
        return newest(
            self._failover,
            beginning,
            lambda channel, known: RolloutsServiceStub(channel).WatchRollout(WatchRolloutRequest(id=known)),
            lambda response: response.rollout,
            is_ended,
        )
