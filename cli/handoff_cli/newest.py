"""Records of a watch that goes on at another controller when its own is lost, each newer than the one before."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Protocol, TypeVar

import grpc.aio

from handoff_cli.failover import Failover


class Record(Protocol):
    """A migration or a rollout."""

    id: str
    revision: int


R = TypeVar("R", bound=Record)
Request = TypeVar("Request")
Response = TypeVar("Response")


async def newest(
    failover: Failover,
    beginning: str,
    opened: Callable[[grpc.aio.Channel, str], "grpc.aio.UnaryStreamCall[Request, Response]"],
    record_of: Callable[[Response], R],
    is_last: Callable[[R], bool],
) -> AsyncGenerator[R, None]:
    """The record as it is now, then as it changes, the final state last; never an older one than before.

    `opened` starts a watch of the record with an id, or a beginning of one. Raises what Failover's methods do.
    """
    latest: R | None = None
    async with aclosing(
        failover.stream(lambda channel: opened(channel, latest.id if latest is not None else beginning))
    ) as responses:
        async for response in responses:
            record = record_of(response)
            if latest is not None and (record == latest or record.revision < latest.revision):
                continue
            latest = record
            yield record
            if is_last(record):
                return
