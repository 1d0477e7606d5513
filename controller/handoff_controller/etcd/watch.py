"""Watches that lose nothing: not when their member dies, freezes or is cut off, nor when history is compacted.

A member that is gone without a word looks like one with no news, so we ask each second for a sign of life and take
another member after 2.5 s of silence. A watch goes on from the last event that was delivered; the revisions of
those signs of life are not used for that, since etcd before 3.4.25 and 3.5.8 may send them ahead of events.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import grpc
import grpc.aio
import structlog

from etcdserverpb import rpc_pb2
from handoff_common.errors import DeadlineError, UnavailableError, from_rpc_error
from handoff_controller.etcd.client import HAS_LEADER, EtcdClient, backoff_s, may_pass, prefix_end
from handoff_controller.etcd.txn import KeyValue, to_key_value
from mvccpb import kv_pb2

log = structlog.get_logger()

PROGRESS_EVERY_S = 1.0
SILENCE_S = 2.5


@dataclass(frozen=True, slots=True)
class Put:
    """A key was created or written."""

    revision: int
    item: KeyValue


@dataclass(frozen=True, slots=True)
class Delete:
    """A key was deleted, by a writer or with its lease."""

    revision: int
    key: str


@dataclass(frozen=True, slots=True)
class Resync:
    """History up to here was compacted away: `items` is all that there is now; drop what was known before."""

    revision: int
    items: tuple[KeyValue, ...]


Change = Put | Delete | Resync


async def watch(client: EtcdClient, key: str, start_revision: int) -> AsyncGenerator[Change, None]:
    """Yields every change from `start_revision` on, in order, each once; for ever, whatever happens to etcd.

    A `key` that ends in "/" stands for all keys below it. Use it within `contextlib.aclosing`, so that its call ends
    when you leave the loop. Raises a HandoffError only when etcd refuses the watch for good.
    """
    next_revision = start_revision
    failures = itertools.count()
    while True:
        try:
            async with aclosing(_responses(client, key, next_revision)) as responses:
                async for response in responses:
                    failures = itertools.count()
                    if response.compact_revision:
                        resync = await _read_all(client, key)
                        next_revision = resync.revision + 1
                        yield resync
                        break
                    if response.canceled:
                        log.warning("etcd cancelled a watch", key=key, reason=response.cancel_reason)
                        break
                    for event in response.events:
                        if event.kv.mod_revision >= next_revision:
                            yield _to_change(event)
                    if response.events:
                        next_revision = max(next_revision, response.events[-1].kv.mod_revision + 1)
        except grpc.aio.AioRpcError as error:
            if not may_pass(error) and not _is_cut(error):
                raise from_rpc_error(error, client.name) from error
        except TimeoutError:
            log.info("etcd watch silent, taking another member", key=key, silent_s=SILENCE_S)
        except (UnavailableError, DeadlineError, asyncio.InvalidStateError, grpc.aio.UsageError) as error:
            log.info("etcd watch broken, opening it again", key=key, error=str(error))
        await asyncio.sleep(backoff_s(next(failures)))


async def follow(client: EtcdClient, prefix: str) -> AsyncGenerator[dict[str, KeyValue], None]:
    """Yields the keys below `prefix` as they are now and after each change; use it within `contextlib.aclosing`."""
    start = await _read_until_answered(client, prefix)
    known = {item.key: item for item in start.items}
    yield dict(known)
    async with aclosing(watch(client, prefix, start.revision + 1)) as changes:
        async for change in changes:
            match change:
                case Put():
                    known[change.item.key] = change.item
                case Delete():
                    known.pop(change.key, None)
                case Resync():
                    known = {item.key: item for item in change.items}
            yield dict(known)


def _is_cut(error: grpc.aio.AioRpcError) -> bool:
    """The stream broke as it was written to: grpc.aio then has no status of etcd's, and makes one up."""
    return error.code() is grpc.StatusCode.INTERNAL and (error.details() or "") == "Internal error from Core"


async def _responses(client: EtcdClient, key: str, start_revision: int) -> AsyncGenerator[rpc_pb2.WatchResponse, None]:
    """One watch on one member. Raises TimeoutError after SILENCE_S without a word."""
    call = client.watch_stub.Watch(metadata=HAS_LEADER)
    create = rpc_pb2.WatchCreateRequest(
        key=key.encode(),
        range_end=prefix_end(key) if key.endswith("/") else b"",
        start_revision=start_revision,
    )
    asking: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(SILENCE_S):
            await call.write(rpc_pb2.WatchRequest(create_request=create))
        asking = asyncio.create_task(_ask_for_progress(call))
        while True:
            async with asyncio.timeout(SILENCE_S):
                response = await call.read()
            if not isinstance(response, rpc_pb2.WatchResponse):
                return
            yield response
    finally:
        call.cancel()
        if asking is not None:
            asking.cancel()
            await asyncio.wait((asking,))


async def _ask_for_progress(call: grpc.aio.StreamStreamCall[rpc_pb2.WatchRequest, rpc_pb2.WatchResponse]) -> None:
    """Asks until the call breaks; why it broke, its reader learns."""
    request = rpc_pb2.WatchRequest(progress_request=rpc_pb2.WatchProgressRequest())
    while not call.done():
        await asyncio.sleep(PROGRESS_EVERY_S)
        try:
            await call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return


async def _read_all(client: EtcdClient, key: str) -> Resync:
    revision, items = await client.list(key)
    if not key.endswith("/"):
        items = tuple(item for item in items if item.key == key)
    return Resync(revision, items)


async def _read_until_answered(client: EtcdClient, prefix: str) -> Resync:
    while True:
        try:
            return await _read_all(client, prefix)
        except (UnavailableError, DeadlineError) as error:
            log.warning("etcd does not answer", error=str(error))


def _to_change(event: kv_pb2.Event) -> Change:
    if event.type == kv_pb2.Event.DELETE:
        return Delete(event.kv.mod_revision, event.kv.key.decode())
    return Put(event.kv.mod_revision, to_key_value(event.kv))
