"""The controller's API as the command sees it: any of several replicas, the next one when one does not answer.

A read is tried once with each controller. A write goes on in rounds while a controller answers that nobody leads,
because an election takes a few seconds; it is safe to repeat: a migration is created under an id of our own choice,
and a cancel is a wish. A watch goes on through other controllers until the migration is final.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from datetime import datetime
from types import TracebackType
from typing import Self, TypeVar

import grpc
import grpc.aio

from handoff.controller.v1.guests_pb2 import ListGuestsRequest, ListGuestsResponse
from handoff.controller.v1.guests_pb2_grpc import GuestsServiceStub
from handoff.controller.v1.hosts_pb2 import ListHostsRequest, ListHostsResponse
from handoff.controller.v1.hosts_pb2_grpc import HostsServiceStub
from handoff.controller.v1.migrations_pb2 import (
    CancelMigrationRequest,
    CreateMigrationRequest,
    GetMigrationRequest,
    ListMigrationsRequest,
    ListMigrationsResponse,
    Migration,
    WatchMigrationRequest,
    WatchMigrationResponse,
)
from handoff.controller.v1.migrations_pb2_grpc import MigrationsServiceStub
from handoff_cli.states import is_final
from handoff_common.channel import open_channel
from handoff_common.errors import (
    ConflictError,
    DeadlineError,
    HandoffError,
    PreconditionError,
    UnavailableError,
    from_rpc_error,
)

# One try with one controller, in seconds. A frozen one does not even greet; a create asks both hosts.
GREETING_S = 2.0
READ_S = 4.0
WRITE_S = 15.0
# A controller that was cut off from etcd falls silent, and so does a migration that waits: asking another one tells.
WATCH_SILENCE_S = 5.0
ROUND_PAUSE_S = 0.5

SETTLED = frozenset({grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE})
RETRIED = (UnavailableError, DeadlineError, ConflictError)
Answer = TypeVar("Answer")
Call = Callable[[grpc.aio.Channel, float], Awaitable[Answer]]


def new_request_id(now: datetime) -> str:
    """An id for a new migration, of the same form as the controller's own: sorts by creation, can be said aloud."""
    return f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


class Controllers:
    """The replicas, asked in the order given; the one that answered last is asked first. An async context manager.

    `deadline_s`: longest time for a call in all; for a watch, longest time without a word from any controller.
    `on_trouble` is told, in a sentence, what makes a call take longer.
    All methods raise the HandoffError that the controller answered, UnavailableError when none answered.
    """

    def __init__(
        self, addresses: Sequence[str], deadline_s: float, on_trouble: Callable[[str], None] = lambda _: None
    ) -> None:
        self._addresses = tuple(addresses)
        self._deadline_s = deadline_s
        self._on_trouble = on_trouble
        self._first = 0
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for channel in self._channels.values():
            await channel.close()

    async def hosts(self) -> ListHostsResponse:
        """All hosts."""
        return await self._read(lambda channel, s: HostsServiceStub(channel).ListHosts(ListHostsRequest(), timeout=s))

    async def guests(self, host: str = "") -> ListGuestsResponse:
        """The guests, of one host or of all."""
        request = ListGuestsRequest(host=host)
        return await self._read(lambda channel, s: GuestsServiceStub(channel).ListGuests(request, timeout=s))

    async def migrations(self, guest: str = "", *, active_only: bool = False) -> ListMigrationsResponse:
        """The migrations, newest first."""
        request = ListMigrationsRequest(guest=guest, active_only=active_only)
        return await self._read(lambda channel, s: MigrationsServiceStub(channel).ListMigrations(request, timeout=s))

    async def migration(self, beginning: str) -> Migration:
        """One migration, by its id or an unambiguous beginning of it."""
        request = GetMigrationRequest(id=beginning)
        response = await self._read(lambda channel, s: MigrationsServiceStub(channel).GetMigration(request, timeout=s))
        return response.migration

    async def create(self, request: CreateMigrationRequest) -> Migration:
        """Starts a migration. `request` must carry a request_id; then this may be called again at will.

        Raises PreconditionError when that id belongs to another guest's or host's migration.
        """
        assert request.request_id
        try:
            response = await self._write(
                lambda channel, s: MigrationsServiceStub(channel).CreateMigration(request, timeout=s)
            )
        except PreconditionError:
            # An unanswered try of ours may be what stands in the way.
            try:
                created = await self.migration(request.request_id)
            except HandoffError:
                created = None
            if created is None or created.id != request.request_id:
                raise
        else:
            created = response.migration
        if request.guest not in (created.guest_name, created.guest_uuid) or (
            request.destination_host != created.destination.host
        ):
            raise PreconditionError(
                f"request id {created.id} belongs to the migration of {created.guest_name} "
                f"to {created.destination.host}; choose another"
            )
        return created

    async def cancel(self, beginning: str) -> Migration:
        """Asks for the abort."""
        request = CancelMigrationRequest(id=beginning)
        response = await self._write(
            lambda channel, s: MigrationsServiceStub(channel).CancelMigration(request, timeout=s)
        )
        return response.migration

    async def watch(self, beginning: str) -> AsyncGenerator[Migration, None]:
        """The migration as it is now, then as it changes, the final state last; never an older one than before."""
        loop = asyncio.get_running_loop()
        last_word = loop.time()
        latest: Migration | None = None
        failed = 0
        while True:
            address = self._addresses[self._first]
            trouble = ""
            try:
                async with aclosing(self._watch_through(address, latest.id if latest else beginning)) as changes:
                    async for migration in changes:
                        last_word, failed = loop.time(), 0
                        if latest is not None and (migration == latest or migration.revision < latest.revision):
                            continue
                        latest = migration
                        yield migration
                        if is_final(migration):
                            return
            except RETRIED as error:
                trouble = error.message
                failed += 1
                if loop.time() - last_word > self._deadline_s or (latest is None and failed == len(self._addresses)):
                    raise
            self._first = (self._first + 1) % len(self._addresses)
            if trouble:
                self._on_trouble(f"{trouble}; asking {self._addresses[self._first]}")
                if failed % len(self._addresses) == 0:
                    await asyncio.sleep(ROUND_PAUSE_S)

    async def _watch_through(self, address: str, migration_id: str) -> AsyncGenerator[Migration, None]:
        """What one controller tells, until it closes the stream or falls silent."""
        channel = await self._greeted(address)
        call = MigrationsServiceStub(channel).WatchMigration(WatchMigrationRequest(id=migration_id))
        patience_s = READ_S
        try:
            while True:
                async with asyncio.timeout(patience_s):
                    response = await call.read()
                if not isinstance(response, WatchMigrationResponse):
                    return
                yield response.migration
                patience_s = WATCH_SILENCE_S
        except TimeoutError:
            if patience_s == READ_S:
                raise DeadlineError(f"{address} did not answer in time") from None
        except grpc.aio.AioRpcError as error:
            raise self._explained(error, address) from error
        finally:
            call.cancel()

    def _is_connected(self, address: str) -> bool:
        return self._channel(address).get_state() is grpc.ChannelConnectivity.READY

    def _explained(self, error: grpc.aio.AioRpcError, address: str) -> HandoffError:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineError(f"{address} did not answer in time")
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

    async def _read(self, call: Call[Answer]) -> Answer:
        try:
            return await self._round(call, READ_S, asyncio.get_running_loop().time() + self._deadline_s)
        except _RoundFailed as failure:
            raise failure.error from failure

    async def _write(self, call: Call[Answer]) -> Answer:
        """Raises DeadlineError when a controller got the call and may have done it, UnavailableError when none did."""
        ends = asyncio.get_running_loop().time() + self._deadline_s
        unknown = False
        while True:
            try:
                return await self._round(call, WRITE_S, ends)
            except _RoundFailed as failure:
                unknown = unknown or failure.unknown
                if not failure.somebody_there or asyncio.get_running_loop().time() + ROUND_PAUSE_S > ends:
                    raise DeadlineError(failure.error.message) if unknown else failure.error from failure
                self._on_trouble(f"{failure.error.message}; trying again")
            await asyncio.sleep(ROUND_PAUSE_S)

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
                if not isinstance(problem, RETRIED):
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
