"""Reads and transactions against an etcd cluster, whichever of its members are alive.

Calls go round the members. Each try has a timeout of its own, so that a frozen member costs one try, and tries are
repeated with a growing timeout and a short random pause until the call's deadline.
"""

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from etcdserverpb import rpc_pb2, rpc_pb2_grpc
from handoff_common.channel import open_balanced_channel
from handoff_common.errors import DeadlineError, HandoffError, UnavailableError, from_rpc_error
from handoff_controller.etcd.txn import (
    Compare,
    KeyValue,
    Op,
    ReadOp,
    TxnResult,
    applies_once,
    to_key_value,
    to_request,
    to_result,
)

DEADLINE_S = 10.0
FIRST_TRY_S = 1.0
LONGEST_TRY_S = 8.0
LONGEST_PAUSE_S = 0.5

# With it, a member that is cut off from the others refuses at once instead of holding the call.
HAS_LEADER = (("hasleader", "true"),)

_PASSING = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
    }
)
# Refused by gRPC before it sent anything, or by etcd before it proposed anything: the write was not applied.
_NEVER_APPLIED = (
    "failed to connect to all addresses",
    "connections to all backends failing",
    "etcdserver: no leader",
    "etcdserver: too many requests",
    "raft proposal dropped",
)

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


class EtcdClient:
    """A client of one cluster; `endpoints` are its members, each "ipv4:port". Connects lazily; close it at the end.

    A call raises UnavailableError when no member took it before its deadline, DeadlineError when it was taken but not
    answered, and another HandoffError at once when etcd refuses it for good.
    """

    def __init__(self, endpoints: Sequence[str]) -> None:
        self.name = f"etcd at {', '.join(endpoints)}"
        self._channel = open_balanced_channel(endpoints)
        self._kv = rpc_pb2_grpc.KVStub(self._channel)
        self.watch_stub = rpc_pb2_grpc.WatchStub(self._channel)
        self.lease_stub = rpc_pb2_grpc.LeaseStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channel; end watches and leases before."""
        await self._channel.close()

    async def get(self, key: str, *, deadline_s: float = DEADLINE_S) -> KeyValue | None:
        """Reads a key, linearizably: never an older state than one that anybody has seen."""
        response, _ = await self.call(self._kv.Range, rpc_pb2.RangeRequest(key=key.encode()), deadline_s=deadline_s)
        return to_key_value(response.kvs[0]) if response.kvs else None

    async def list(self, prefix: str, *, deadline_s: float = DEADLINE_S) -> tuple[int, tuple[KeyValue, ...]]:
        """Reads all keys that begin with `prefix`, in the order of their names, and the store's revision at that.

        A watch from that revision + 1 on misses nothing.
        """
        request = rpc_pb2.RangeRequest(key=prefix.encode(), range_end=prefix_end(prefix))
        response, _ = await self.call(self._kv.Range, request, deadline_s=deadline_s)
        return response.header.revision, tuple(to_key_value(found) for found in response.kvs)

    async def txn(
        self,
        compares: Sequence[Compare],
        success_ops: Sequence[Op],
        failure_ops: Sequence[ReadOp] = (),
        *,
        deadline_s: float = DEADLINE_S,
    ) -> TxnResult:
        """Applies `success_ops` together if all compares hold, else answers `failure_ops`.

        A try that got no answer may have been applied. The transaction is sent again only when it can't be applied
        twice (see `applies_once`); a repeated one that was applied comes back with `succeeded` False and `uncertain`.

        Raises UnavailableError when nothing was applied, nor will be. Raises DeadlineError when that is not known,
        and then it is not over: a frozen member may apply it whenever it wakes up, for as long as the compares hold.
        So read again, and before acting on "it was not applied" write one of the compared keys.
        """
        response, uncertain = await self.call(
            self._kv.Txn,
            to_request(compares, success_ops, failure_ops),
            repeatable=applies_once(compares, success_ops),
            deadline_s=deadline_s,
        )
        return to_result(response, uncertain=uncertain)

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        *,
        repeatable: bool = True,
        deadline_s: float = DEADLINE_S,
    ) -> tuple[Response, bool]:
        """Calls until answered; returns the answer and whether an earlier try may have been applied unseen.

        With `repeatable` False, only tries that were surely not applied are repeated.
        """
        until = time.monotonic() + deadline_s
        uncertain = False
        for attempt in itertools.count():
            try_s = min(FIRST_TRY_S * 2.0**attempt, LONGEST_TRY_S, max(0.05, until - time.monotonic()))
            try:
                return await method(request, timeout=try_s, metadata=HAS_LEADER), uncertain
            except grpc.aio.AioRpcError as error:
                if not may_pass(error):
                    raise from_rpc_error(error, self.name) from error
                uncertain = uncertain or not _was_never_applied(error)
                pause_s = backoff_s(attempt)
                if (uncertain and not repeatable) or time.monotonic() + pause_s >= until:
                    raise self._no_answer(error, uncertain=uncertain) from error
            await asyncio.sleep(pause_s)
        raise AssertionError("unreachable")

    def _no_answer(self, error: grpc.aio.AioRpcError, *, uncertain: bool) -> HandoffError:
        details = error.details() or error.code().name
        if uncertain:
            return DeadlineError(f"{self.name}: no answer, the call may have been applied or may be yet: {details}")
        return UnavailableError(f"{self.name}: no member took the call: {details}")


def may_pass(error: grpc.aio.AioRpcError) -> bool:
    """Whether the same call may succeed on another member or a moment later."""
    return error.code() in _PASSING or _was_never_applied(error)


def backoff_s(attempt: int) -> float:
    """The pause after the failed try number `attempt` (from 0): random, so that clients don't come in step."""
    return min(LONGEST_PAUSE_S, 0.02 * 2.0 ** min(attempt, 10)) * random.uniform(0.5, 1.0)  # noqa: S311


def prefix_end(prefix: str) -> bytes:
    """The first key after all those that begin with `prefix`. UTF-8 has no byte 0xff, so one step is enough."""
    raw = prefix.encode()
    if not raw:
        raise ValueError("an empty prefix would stand for the whole store")
    return raw[:-1] + bytes([raw[-1] + 1])


def _was_never_applied(error: grpc.aio.AioRpcError) -> bool:
    details = error.details() or ""
    return any(known in details for known in _NEVER_APPLIED)
