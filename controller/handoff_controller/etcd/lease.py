"""Leases whose holder knows, without asking, when it must stop.

The local deadline is counted from before the request that granted or refreshed the lease was sent, on the monotonic
clock, which goes on while the process is stopped (SIGSTOP). So it passes before etcd's own does. It is a courtesy
all the same: a member that froze may drop a lease early. What is truly held only a guarded write can tell.
"""

import asyncio
import time
from types import TracebackType
from typing import Self

import grpc
import grpc.aio
import structlog

from etcdserverpb import rpc_pb2
from handoff_common.errors import HandoffError, InvalidArgumentError
from handoff_controller.etcd.client import HAS_LEADER, EtcdClient

log = structlog.get_logger()

# With 3 s, live leases were lost when a frozen etcd leader came back.
MIN_TTL_S = 6
REFRESH_TRY_S = 1.0
RETRY_PAUSE_S = 0.1
REVOKE_DEADLINE_S = 2.0


class Lease:
    """A lease that is kept alive within `async with`, and revoked at its end so that its keys go at once.

    Entering raises UnavailableError or DeadlineError when etcd does not grant it within half of `ttl_s`. `lost` is set
    when the local deadline has passed or etcd says that the lease is gone; a lost lease never comes back.
    """

    def __init__(self, client: EtcdClient, ttl_s: int = MIN_TTL_S) -> None:
        if ttl_s < MIN_TTL_S:
            raise InvalidArgumentError(f"a lease of {ttl_s} s would be lost while alive; use {MIN_TTL_S} s or more")
        self.lost = asyncio.Event()
        self._client = client
        self._ttl_s = ttl_s
        self._id = 0
        self._expires_at = 0.0
        self._keeper: asyncio.Task[None] | None = None

    @property
    def id(self) -> int:
        """The number that etcd gave it; 0 before it was entered."""
        return self._id

    def valid(self) -> bool:
        """Whether the lease is held for sure, as far as this host's clock can tell."""
        return not self.lost.is_set() and time.monotonic() < self._expires_at

    async def __aenter__(self) -> Self:
        sent_at = time.monotonic()
        request = rpc_pb2.LeaseGrantRequest(TTL=self._ttl_s)
        # A grant whose answer was lost leaves a lease without keys, which expires by itself.
        response, _ = await self._client.call(self._client.lease_stub.LeaseGrant, request, deadline_s=self._ttl_s / 2)
        self._id = response.ID
        self._expires_at = sent_at + response.TTL
        self._keeper = asyncio.create_task(self._keep_alive(), name=f"lease {self._id:x}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait((self._keeper,))
        request = rpc_pb2.LeaseRevokeRequest(ID=self._id)
        try:
            await self._client.call(self._client.lease_stub.LeaseRevoke, request, deadline_s=REVOKE_DEADLINE_S)
        except HandoffError as failure:
            log.info("lease not revoked, it expires by itself", lease=f"{self._id:x}", error=failure.message)

    async def _keep_alive(self) -> None:
        """Refreshes at a quarter of the TTL, on whichever member answers, until the lease is lost."""
        try:
            while (left_s := self._expires_at - time.monotonic()) > 0:
                refreshed = await self._refresh(min(REFRESH_TRY_S, left_s))
                pause_s = self._ttl_s / 4 if refreshed else RETRY_PAUSE_S
                await asyncio.sleep(max(0.0, min(pause_s, self._expires_at - time.monotonic())))
        except _LeaseGoneError:
            log.warning("etcd has dropped the lease", lease=f"{self._id:x}")
        finally:
            self.lost.set()

    async def _refresh(self, timeout_s: float) -> bool:
        """Tries once; a call of its own each time, so that a frozen member spoils one try and not the lease."""
        sent_at = time.monotonic()
        call = self._client.lease_stub.LeaseKeepAlive(timeout=timeout_s, metadata=HAS_LEADER)
        try:
            await call.write(rpc_pb2.LeaseKeepAliveRequest(ID=self._id))
            response = await call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return False
        finally:
            call.cancel()
        if not isinstance(response, rpc_pb2.LeaseKeepAliveResponse):
            return False
        if response.TTL <= 0:
            raise _LeaseGoneError
        self._expires_at = max(self._expires_at, sent_at + response.TTL)
        return True


class _LeaseGoneError(Exception):
    """Etcd does not know the lease any more."""
