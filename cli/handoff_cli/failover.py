"""Asks one of several controllers, the next one when one does not answer."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TypeAlias, TypeVar, cast

import grpc
import grpc.aio

from handoff_common.channel import open_channel
from handoff_common.errors import (
    ConflictError,
    DeadlineError,
    HandoffError,
    HostDownError,
    InvalidArgumentError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
    from_rpc_error,
)

# One try with one controller, in seconds. A frozen one does not even greet; a create asks both hosts.
GREETING_S = 2.0
READ_S = 4.0
WRITE_S = 15.0
# A controller that was cut off from etcd falls silent, and so does a migration that waits: asking another one tells.
STREAM_SILENCE_S = 5.0
ROUND_PAUSE_S = 0.5

SETTLED = frozenset({grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE})
RETRIED = (UnavailableError, DeadlineError, ConflictError)
# What another controller would answer as well.
FINAL = (InvalidArgumentError, NotFoundError, PreconditionError)

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Call: TypeAlias = Callable[[grpc.aio.Channel, float], Awaitable[Answer]]
"""Makes a call on a channel, with a deadline in seconds."""


class Failover:
    """Controllers, asked in the order given; the one that answered last is asked first.

    `deadline_s`: longest time for a call in all; for a stream, longest time without a word from any controller.
    `on_trouble` is told, in a sentence, what makes a call take longer.
    All methods raise the HandoffError that a controller answered, UnavailableError when none answered.
    """

    def __init__(self, addresses: Sequence[str], deadline_s: float, on_trouble: Callable[[str], None]) -> None:
        self._addresses = tuple(addresses)
        self._deadline_s = deadline_s
        self._on_trouble = on_trouble
        self._first = 0
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def close(self) -> None:
        """Closes the connections."""
        for channel in self._channels.values():
            await channel.close()

    async def read(self, call: Call[Answer]) -> Answer:
        """The answer to a call that changes nothing; each controller is tried once."""
        try:
            return await self._round(call, READ_S, asyncio.get_running_loop().time() + self._deadline_s)
        except _RoundFailed as failure:
            raise failure.error from failure

    async def write(self, call: Call[Answer], *, try_s: float | None = None) -> Answer:
        """The answer to a call that changes something and is safe to repeat. `try_s`: for one try, in seconds.

        Goes on in rounds while a controller answers that it can't now, because an election takes a few seconds.
        Raises DeadlineError when a controller got the call and may have done it, UnavailableError when none did.
        """
        ends = asyncio.get_running_loop().time() + self._deadline_s
        unknown = False
        while True:
            try:
                return await self._round(call, try_s or WRITE_S, ends)
            except _RoundFailed as failure:
                unknown = unknown or failure.unknown
                if not failure.somebody_there or asyncio.get_running_loop().time() + ROUND_PAUSE_S > ends:
                    raise DeadlineError(failure.error.message) if unknown else failure.error from failure
                self._on_trouble(f"{failure.error.message}; trying again")
            await asyncio.sleep(ROUND_PAUSE_S)

    async def stream(
        self, opened: Callable[[grpc.aio.Channel], grpc.aio.UnaryStreamCall[Request, Answer]]
    ) -> AsyncGenerator[Answer, None]:
        """What a stream says, through one controller after another, until the caller has heard enough.

        `opened` opens it; each time it must begin with how things are now.
        """
        loop = asyncio.get_running_loop()
        last_word = loop.time()
        heard = False
        failed = 0
        while True:
            trouble = ""
            try:
                async with aclosing(self._stream_through(self._addresses[self._first], opened)) as answers:
                    async for answer in answers:
                        last_word, heard, failed = loop.time(), True, 0
                        yield answer
            except FINAL:
                raise
            except HandoffError as error:
                trouble = error.message
                failed += 1
                nobody = not heard and failed == len(self._addresses)
                if nobody or loop.time() - last_word > self._deadline_s:
                    raise
            self._first = (self._first + 1) % len(self._addresses)
            if trouble:
                self._on_trouble(f"{trouble}; asking {self._addresses[self._first]}")
                if failed % len(self._addresses) == 0:
                    await asyncio.sleep(ROUND_PAUSE_S)

    async def _stream_through(
        self, address: str, opened: Callable[[grpc.aio.Channel], grpc.aio.UnaryStreamCall[Request, Answer]]
    ) -> AsyncGenerator[Answer, None]:
        """What one controller says, until it closes the stream or falls silent."""
        call = opened(await self._greeted(address))
        patience_s = READ_S
        heard = False
        try:
            while True:
                async with asyncio.timeout(patience_s):
                    answer = await call.read()
                if answer is grpc.aio.EOF:
                    break
                heard = True
                patience_s = STREAM_SILENCE_S
                yield cast(Answer, answer)
        except TimeoutError:
            pass
        except grpc.aio.AioRpcError as error:
            raise self._explained(error, address) from error
        finally:
            call.cancel()
        if not heard:
            raise DeadlineError(f"{address} did not answer in time")

    def _is_connected(self, address: str) -> bool:
        return self._channel(address).get_state() is grpc.ChannelConnectivity.READY

    def _explained(self, error: grpc.aio.AioRpcError, address: str) -> HandoffError:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineError(f"{address} did not answer in time")
        if error.code() is grpc.StatusCode.CANCELLED:
            return UnavailableError(f"{address}: cut the call off; is it being stopped?")
        if error.code() is grpc.StatusCode.UNAVAILABLE and not self._is_connected(address):
            # "failed to connect to all addresses; last error: UNKNOWN: ipv4:…: Connection refused (111)"
            cause = (error.details() or "no connection").rsplit(": ", 1)[-1]
            return UnavailableError(f"{address}: {cause}")
        return from_rpc_error(error, address)

    async def _greeted(self, address: str) -> grpc.aio.Channel:
        """A channel that is connected, or whose next call fails at once. Raises UnavailableError for a frozen peer."""
        channel = self._channel(address)
        try:
            async with asyncio.timeout(GREETING_S):
                while (state := channel.get_state(try_to_connect=True)) not in SETTLED:
                    await channel.wait_for_state_change(state)
        except TimeoutError:
            raise UnavailableError(
                f"{address}: no greeting within {GREETING_S:g} s; is it frozen or cut off?"
            ) from None
        return channel

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = open_channel(address)
        return self._channels[address]

    async def _round(self, call: Call[Answer], try_s: float, ends: float) -> Answer:
        """The first answer of a controller. Raises _RoundFailed when none has one, or the HandoffError answered."""
        problems: list[str] = []
        refusal: HandoffError | None = None
        unknown = False
        for offset in range(len(self._addresses)):
            number = (self._first + offset) % len(self._addresses)
            address = self._addresses[number]
            left_s = ends - asyncio.get_running_loop().time()
            if left_s <= 0:
                problems.append(f"{address}: not asked, the time was up")
                continue
            try:
                channel = await self._greeted(address)
            except UnavailableError as error:
                problems.append(error.message)
                continue
            connected = self._is_connected(address)
            try:
                answer = await call(channel, min(try_s, left_s))
            except grpc.aio.AioRpcError as error:
                problem = self._explained(error, address)
                if not isinstance(problem, RETRIED) or isinstance(problem, HostDownError):
                    raise problem from error
                # A connection that is still up means that the controller itself said so.
                if self._is_connected(address) and not isinstance(problem, DeadlineError):
                    refusal = refusal or problem
                else:
                    unknown = unknown or connected
                problems.append(problem.message)
            else:
                self._first = number
                return answer
        final = refusal or UnavailableError(f"no controller answered ({'; '.join(problems)})")
        raise _RoundFailed(final, somebody_there=refusal is not None, unknown=unknown)


class _RoundFailed(Exception):  # noqa: N818 - an outcome of ours
    """No controller had an answer."""

    def __init__(self, error: HandoffError, *, somebody_there: bool, unknown: bool) -> None:
        """`somebody_there`: one said that it can't now. `unknown`: one may have done it without telling."""
        super().__init__(error.message)
        self.error = error
        self.somebody_there = somebody_there
        self.unknown = unknown
