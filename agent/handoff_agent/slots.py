"""The host's libvirt daemons: connections that survive restarts and freezes, and calls with deadlines.

A frozen libvirtd blocks the threads that asked it until it is back; their callers get a DeadlineError in time. After
about 8 s keep-alive notices, on a connection for events alone, which is made again when the daemon is back.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import ClassVar, TypeAlias, TypeVar

import grpc
import libvirt
import structlog

from handoff_agent.events import (
    ConnectionEvent,
    EventHub,
    Subscription,
    on_libvirt_loop,
    register_events,
    start_libvirt_loop,
)
from handoff_agent.lanes import Lane, Line
from handoff_common.errors import (
    DeadlineError,
    HandoffError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)

log = structlog.get_logger()

T = TypeVar("T")
_Close: TypeAlias = Callable[[], None]

CALL_TIMEOUT_S = 10.0
KEEPALIVE_INTERVAL_S = 2
KEEPALIVE_COUNT = 3
RECONNECT_DELAY_S = 0.5
# The urgent lane is for what is done while a guest is paused: it never waits behind an inventory.
ORDINARY_LINES = 3
URGENT_LINES = 3


class LibvirtFailure(HandoffError):  # noqa: N818 - libvirtError is the exception that it stands for
    """libvirt refused or failed (INTERNAL). `libvirt_code` is one of libvirt's VIR_ERR_*."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    def __init__(self, message: str, libvirt_code: int) -> None:
        super().__init__(message)
        self.libvirt_code = libvirt_code


class Slot:
    """One libvirt daemon and our connections to it."""

    def __init__(self, name: str, uri: str) -> None:
        self.name = name
        self.uri = uri
        self.host_uuid = ""
        self.libvirt_version = ""
        self.hub = EventHub()
        self._ordinary = Lane(f"libvirt-{name}", uri, ORDINARY_LINES)
        self._urgent = Lane(f"libvirt-{name}-urgent", uri, URGENT_LINES)
        self._owner: asyncio.Task[None] | None = None
        self._up = asyncio.Event()

    @property
    def connected(self) -> bool:
        """libvirtd is there, and answered a few seconds ago."""
        return self._up.is_set()

    async def start(self) -> None:
        """Begins to connect, and to connect again whenever the connection is lost; returns at once."""
        start_libvirt_loop()
        self.hub.bind()
        self._owner = asyncio.create_task(self._maintain(), name=f"slot-{self.name}")

    async def close(self) -> None:
        """Ends the connections. Domains and transfers are not touched."""
        if self._owner is not None:
            self._owner.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._owner
        self._ordinary.close()
        self._urgent.close()

    async def wait_connected(self, timeout_s: float) -> bool:
        """Waits for a connection; tells whether there is one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
        return self.connected

    @contextlib.contextmanager
    def events(self, uuid: str | None = None) -> Iterator[Subscription]:
        """Subscribes to the events of one domain, or of all."""
        with self.hub.subscribe(uuid) as subscription:
            yield subscription

    async def call(
        self, fn: Callable[[libvirt.virConnect], T], timeout_s: float = CALL_TIMEOUT_S, *, urgent: bool = False
    ) -> T:
        """Runs `fn` with a connection on a thread. `urgent` takes the lane that is kept free for paused guests.

        An object of libvirt's that `fn` returns must not be used any more: a connection is for one thread at a time.

        Raises UnavailableError without a libvirtd, DeadlineError after `timeout_s` (the call may still take effect),
        NotFoundError for an unknown domain, PreconditionError for what the domain's state does not allow, and
        LibvirtFailure for everything else that libvirt says.
        """
        return await self._on_line(lambda line: fn(line.connection), timeout_s, urgent=urgent)

    async def on_domain(
        self,
        uuid: str,
        fn: Callable[[libvirt.virDomain], T],
        timeout_s: float = CALL_TIMEOUT_S,
        *,
        urgent: bool = False,
    ) -> T:
        """Runs `fn` with the domain; for the rest as `call`."""
        return await self._on_line(lambda line: fn(line.domain(uuid)), timeout_s, urgent=urgent)

    def forget(self, uuid: str) -> None:
        """Drops the cached handles of a domain that is gone."""
        self._ordinary.forget(uuid)
        self._urgent.forget(uuid)

    async def _on_line(self, fn: Callable[[Line], T], timeout_s: float, *, urgent: bool) -> T:
        if not self.connected:
            raise UnavailableError(f"slot {self.name}: no connection to libvirtd at {self.uri}; is it running?")
        try:
            async with asyncio.timeout(timeout_s):
                return await (self._urgent if urgent else self._ordinary).run(fn)
        except TimeoutError:
            raise DeadlineError(f"slot {self.name}: libvirtd did not answer within {timeout_s:g} s") from None
        except UnavailableError as error:
            raise UnavailableError(f"slot {self.name}: {error.message}") from error
        except libvirt.libvirtError as error:
            raise self._translate(error) from error

    def _translate(self, error: libvirt.libvirtError) -> HandoffError:
        text = f"slot {self.name}: {error.get_error_message()}"
        code = error.get_error_code()
        match code:
            case libvirt.VIR_ERR_RPC:
                return UnavailableError(text)
            case libvirt.VIR_ERR_NO_DOMAIN:
                return NotFoundError(text)
            case libvirt.VIR_ERR_OPERATION_TIMEOUT | libvirt.VIR_ERR_AGENT_UNRESPONSIVE:
                return DeadlineError(text)
            case libvirt.VIR_ERR_OPERATION_INVALID:
                return PreconditionError(text)
            case _:
                return LibvirtFailure(text, code)

    async def _maintain(self) -> None:
        last_error = ""
        while True:
            closed = asyncio.Event()
            try:
                close = await self._open(closed)
            except libvirt.libvirtError as error:
                if str(error) != last_error:
                    last_error = str(error)
                    log.warning("slot has no libvirtd", slot=self.name, uri=self.uri, error=last_error)
                await asyncio.sleep(RECONNECT_DELAY_S)
                continue
            last_error = ""
            self._up.set()
            log.info("slot connected", slot=self.name, libvirt=self.libvirt_version)
            self.hub.publish(ConnectionEvent(self.name, connected=True))
            try:
                await closed.wait()
                log.warning("slot lost its libvirtd", slot=self.name)
            finally:
                self._up.clear()
                self.hub.publish(ConnectionEvent(self.name, connected=False))
                on_libvirt_loop(close)

    async def _open(self, closed: asyncio.Event) -> _Close:
        """Connects on a thread of its own: libvirt waits for a frozen libvirtd for ever, and no lane must wait too."""
        loop = asyncio.get_running_loop()
        opened: asyncio.Future[_Close] = loop.create_future()

        def on_close(_connection: libvirt.virConnect, _reason: int, _opaque: None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop ended first
                loop.call_soon_threadsafe(closed.set)

        def open_connection() -> None:
            try:
                close = self._connect(on_close)
            except libvirt.libvirtError as error:
                loop.call_soon_threadsafe(_fail, opened, error)
            else:
                loop.call_soon_threadsafe(_succeed, opened, close)

        _run_detached(f"libvirt-{self.name}-open", open_connection)
        return await opened

    def _connect(self, on_close: Callable[[libvirt.virConnect, int, None], None]) -> _Close:
        connection = libvirt.open(self.uri)
        version = connection.getLibVersion()
        self.libvirt_version = f"{version // 1_000_000}.{version // 1_000 % 1_000}.{version % 1_000}"
        self.host_uuid = _host_uuid(connection)
        connection.registerCloseCallback(on_close, None)
        deregister = register_events(connection, self.name, self.hub.publish_threadsafe)

        def close() -> None:
            # Callbacks that stay registered keep the connection open.
            deregister()
            for end in (connection.unregisterCloseCallback, connection.close):
                with contextlib.suppress(libvirt.libvirtError):
                    end()

        try:
            self._urgent.open()
            self._ordinary.open()
            # From now on libvirt's event thread calls on this connection, and no other may (see lanes.py).
            connection.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
        except libvirt.libvirtError:
            close()
            raise
        return close


def _host_uuid(connection: libvirt.virConnect) -> str:
    capabilities: str = connection.getCapabilities()
    _, _, rest = capabilities.partition("<uuid>")
    return rest.partition("</uuid>")[0]


def _succeed(future: asyncio.Future[_Close], close: _Close) -> None:
    if future.done():
        on_libvirt_loop(close)
    else:
        future.set_result(close)


def _fail(future: asyncio.Future[_Close], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _run_detached(name: str, fn: Callable[[], object]) -> None:
    def guarded() -> None:
        with contextlib.suppress(libvirt.libvirtError, RuntimeError):
            fn()

    threading.Thread(target=guarded, name=name, daemon=True).start()


class Hypervisor:
    """All slots of the host."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = tuple(slots)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Hypervisor"]:
        """Keeps all slots connected for as long as the context lasts."""
        async with contextlib.AsyncExitStack() as stack:
            for slot in self.slots:
                await slot.start()
                stack.push_async_callback(slot.close)
            yield self

    def slot(self, name: str) -> Slot:
        """Returns a slot by name. Raises NotFoundError."""
        for slot in self.slots:
            if slot.name == name:
                return slot
        raise NotFoundError(f"this host has no slot {name!r}; it has {', '.join(slot.name for slot in self.slots)}")

    async def find(self, uuid: str) -> Slot:
        """Returns the slot that has a domain; one where it is active wins over one where it is only defined.

        Raises NotFoundError when no connected slot has it, and UnavailableError when none has it but a slot that is not
        connected might.
        """
        found: Slot | None = None
        for slot in self.slots:
            if not slot.connected:
                continue
            try:
                active = await slot.on_domain(uuid, lambda domain: domain.isActive())
            except NotFoundError:
                continue
            if active:
                return slot
            found = found or slot
        if found is not None:
            return found
        missing = [slot.name for slot in self.slots if not slot.connected]
        if missing:
            raise UnavailableError(f"domain {uuid} is not found, and slot {', '.join(missing)} has no libvirtd to ask")
        raise NotFoundError(f"no domain with UUID {uuid} on this host")
