"""The host's libvirt daemons: connections that survive restarts and freezes, and calls with deadlines.

A frozen libvirtd blocks the thread that asked it until keep-alive breaks the connection (about 8 s); the caller gets a
DeadlineError in time, and the connection is made again when the daemon is back.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar, TypeAlias, TypeVar

import grpc
import libvirt
import structlog

from handoff_agent.events import ConnectionEvent, EventHub, Subscription, register_events, start_libvirt_loop
from handoff_common.errors import (
    DeadlineError,
    HandoffError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)

log = structlog.get_logger()

T = TypeVar("T")
_Opened: TypeAlias = tuple[libvirt.virConnect, Callable[[], None]]
"""A connection, and what closes it."""

CALL_TIMEOUT_S = 10.0
KEEPALIVE_INTERVAL_S = 2
KEEPALIVE_COUNT = 3
RECONNECT_DELAY_S = 0.5
# libvirtd serves at most 5 requests of one connection at a time (max_client_requests) and stops reading beyond, even
# keep-alive. The urgent lane is for what is done while a guest is paused: it never waits behind an inventory.
ORDINARY_THREADS = 3
URGENT_THREADS = 2


class LibvirtFailure(HandoffError):  # noqa: N818 - libvirtError is the exception that it stands for
    """libvirt refused or failed (INTERNAL). `libvirt_code` is one of libvirt's VIR_ERR_*."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    def __init__(self, message: str, libvirt_code: int) -> None:
        super().__init__(message)
        self.libvirt_code = libvirt_code


class Slot:
    """One libvirt daemon and our connection to it."""

    def __init__(self, name: str, uri: str) -> None:
        self.name = name
        self.uri = uri
        self.host_uuid = ""
        self.libvirt_version = ""
        self.hub = EventHub()
        self._connection: libvirt.virConnect | None = None
        self._domains: dict[str, libvirt.virDomain] = {}
        self._ordinary = ThreadPoolExecutor(ORDINARY_THREADS, f"libvirt-{name}")
        self._urgent = ThreadPoolExecutor(URGENT_THREADS, f"libvirt-{name}-urgent")
        self._owner: asyncio.Task[None] | None = None
        self._up = asyncio.Event()

    @property
    def connected(self) -> bool:
        """There is a live connection."""
        return self._connection is not None

    async def start(self) -> None:
        """Begins to connect, and to connect again whenever the connection is lost; returns at once."""
        start_libvirt_loop()
        self.hub.bind()
        self._owner = asyncio.create_task(self._maintain(), name=f"slot-{self.name}")

    async def close(self) -> None:
        """Ends the connection. Domains and transfers are not touched."""
        if self._owner is not None:
            self._owner.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._owner
        self._ordinary.shutdown(wait=False, cancel_futures=True)
        self._urgent.shutdown(wait=False, cancel_futures=True)

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
        """Runs `fn` with the connection on a thread. `urgent` takes the lane that is kept free for paused guests.

        Raises UnavailableError without a connection, DeadlineError after `timeout_s` (the call may still take effect),
        NotFoundError for an unknown domain, PreconditionError for what the domain's state does not allow, and
        LibvirtFailure for everything else that libvirt says.
        """
        connection = self._connection
        if connection is None:
            raise UnavailableError(f"slot {self.name}: no connection to libvirtd at {self.uri}; is it running?")
        pool = self._urgent if urgent else self._ordinary
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.get_running_loop().run_in_executor(pool, fn, connection)
        except TimeoutError:
            raise DeadlineError(f"slot {self.name}: libvirtd did not answer within {timeout_s:g} s") from None
        except libvirt.libvirtError as error:
            raise self._translate(error, connection) from error

    async def on_domain(
        self,
        uuid: str,
        fn: Callable[[libvirt.virDomain], T],
        timeout_s: float = CALL_TIMEOUT_S,
        *,
        urgent: bool = False,
    ) -> T:
        """Runs `fn` with the domain; raises as `call` does."""
        domains = self._domains

        def run(connection: libvirt.virConnect) -> T:
            domain = domains.get(uuid)
            if domain is None:
                domain = connection.lookupByUUIDString(uuid)
                domains[uuid] = domain
            return fn(domain)

        return await self.call(run, timeout_s, urgent=urgent)

    def forget(self, uuid: str) -> None:
        """Drops the cached handle of a domain that is gone."""
        self._domains.pop(uuid, None)

    def _translate(self, error: libvirt.libvirtError, connection: libvirt.virConnect) -> HandoffError:
        text = f"slot {self.name}: {error.get_error_message()}"
        code = error.get_error_code()
        if self._connection is not connection or code == libvirt.VIR_ERR_RPC:
            return UnavailableError(f"slot {self.name}: the connection to libvirtd was lost: {error}")
        match code:
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
                connection, close = await self._open(closed)
            except libvirt.libvirtError as error:
                if str(error) != last_error:
                    last_error = str(error)
                    log.warning("slot has no libvirtd", slot=self.name, uri=self.uri, error=last_error)
                await asyncio.sleep(RECONNECT_DELAY_S)
                continue
            last_error = ""
            self._connection, self._domains = connection, {}
            self._up.set()
            log.info("slot connected", slot=self.name, libvirt=self.libvirt_version)
            self.hub.publish(ConnectionEvent(self.name, connected=True))
            try:
                await closed.wait()
                log.warning("slot lost its libvirtd", slot=self.name)
            finally:
                self._connection, self._domains = None, {}
                self._up.clear()
                self.hub.publish(ConnectionEvent(self.name, connected=False))
                _run_detached(f"libvirt-{self.name}-close", close)

    async def _open(self, closed: asyncio.Event) -> _Opened:
        """Connects on a thread of its own: libvirt waits for a frozen libvirtd for ever, and no pool must wait too."""
        loop = asyncio.get_running_loop()
        opened: asyncio.Future[_Opened] = loop.create_future()

        def on_close(_connection: libvirt.virConnect, _reason: int, _opaque: None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop ended first
                loop.call_soon_threadsafe(closed.set)

        def open_connection() -> None:
            try:
                connection = libvirt.open(self.uri)
                connection.registerCloseCallback(on_close, None)
                connection.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
                deregister = register_events(connection, self.name, self.hub.publish_threadsafe)
                version = connection.getLibVersion()
                self.libvirt_version = f"{version // 1_000_000}.{version // 1_000 % 1_000}.{version % 1_000}"
                self.host_uuid = _host_uuid(connection)
            except libvirt.libvirtError as error:
                loop.call_soon_threadsafe(_fail, opened, error)
                return

            def close() -> None:
                # Callbacks that stay registered keep the connection open.
                deregister()
                connection.unregisterCloseCallback()
                connection.close()

            loop.call_soon_threadsafe(_succeed, opened, (connection, close))

        _run_detached(f"libvirt-{self.name}-open", open_connection)
        return await opened


def _host_uuid(connection: libvirt.virConnect) -> str:
    capabilities: str = connection.getCapabilities()
    _, _, rest = capabilities.partition("<uuid>")
    return rest.partition("</uuid>")[0]


def _succeed(future: asyncio.Future[_Opened], opened: _Opened) -> None:
    if not future.done():
        future.set_result(opened)


def _fail(future: asyncio.Future[_Opened], error: Exception) -> None:
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

    async def find(self, uuid: str) -> tuple[Slot, libvirt.virDomain]:
        """Returns the domain and its slot; one that is active wins over one that is only defined.

        Raises NotFoundError when no connected slot has it, and UnavailableError when none has it but a slot that is not
        connected might.
        """
        found: tuple[Slot, libvirt.virDomain] | None = None
        for slot in self.slots:
            if not slot.connected:
                continue
            try:
                domain, active = await slot.call(lambda connection: _lookup(connection, uuid))
            except NotFoundError:
                continue
            if active:
                return slot, domain
            found = found or (slot, domain)
        if found is not None:
            return found
        missing = [slot.name for slot in self.slots if not slot.connected]
        if missing:
            raise UnavailableError(f"domain {uuid} is not found, and slot {', '.join(missing)} has no libvirtd to ask")
        raise NotFoundError(f"no domain with UUID {uuid} on this host")

    async def list(self) -> list[tuple[Slot, libvirt.virDomain]]:
        """Returns all domains of all connected slots, active or only defined."""
        domains: list[tuple[Slot, libvirt.virDomain]] = []
        for slot in self.slots:
            if slot.connected:
                domains.extend((slot, domain) for domain in await slot.call(lambda c: c.listAllDomains()))
        return domains


def _lookup(connection: libvirt.virConnect, uuid: str) -> tuple[libvirt.virDomain, bool]:
    domain = connection.lookupByUUIDString(uuid)
    return domain, bool(domain.isActive())
