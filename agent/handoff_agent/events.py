"""libvirt's events as plain values on the asyncio loop.

libvirt calls back on one thread that runs its own event loop for the whole process. libvirtaio would save that thread,
but libvirt changes its watches and timers from whichever thread makes a call, and asyncio's loop must not be touched
from our executors' threads.
"""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import libvirt
import libvirt_qemu
import structlog

log = structlog.get_logger()

# Not MIGRATION_PASS: a guest at rest makes thousands a second.
MONITOR_EVENTS = "^(STOP|RESUME|MIGRATION)$"
MAX_QUEUED_EVENTS = 4096

_LIFECYCLE_NAMES = {
    libvirt.VIR_DOMAIN_EVENT_DEFINED: "defined",
    libvirt.VIR_DOMAIN_EVENT_UNDEFINED: "undefined",
    libvirt.VIR_DOMAIN_EVENT_STARTED: "started",
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: "suspended",
    libvirt.VIR_DOMAIN_EVENT_RESUMED: "resumed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED: "stopped",
    libvirt.VIR_DOMAIN_EVENT_SHUTDOWN: "shutdown",
    libvirt.VIR_DOMAIN_EVENT_PMSUSPENDED: "pmsuspended",
    libvirt.VIR_DOMAIN_EVENT_CRASHED: "crashed",
}


@dataclass(frozen=True, slots=True)
class LifecycleEvent:
    """A domain changed. `kind` is libvirt's name: "started", "suspended", "resumed", "stopped", "defined"…"""

    slot: str
    uuid: str
    name: str
    kind: str
    monotonic_s: float


@dataclass(frozen=True, slots=True)
class MonitorEvent:
    """QEMU spoke: STOP, RESUME or MIGRATION. `time_s` is QEMU's own clock, seconds since the epoch."""

    slot: str
    uuid: str
    event: str
    time_s: float
    data: Mapping[str, object]
    monotonic_s: float


@dataclass(frozen=True, slots=True)
class ConnectionEvent:
    """The slot's connection to its libvirtd was made or lost. Events in between are lost: look again."""

    slot: str
    connected: bool


Event = LifecycleEvent | MonitorEvent | ConnectionEvent


class Subscription:
    """The events of one subscriber, oldest first. One that doesn't keep up loses the oldest."""

    def __init__(self, uuid: str | None) -> None:
        self._uuid = uuid
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue(MAX_QUEUED_EVENTS)

    def offer(self, event: Event) -> None:
        """Takes an event in, if it concerns this subscriber."""
        if self._uuid is not None and not isinstance(event, ConnectionEvent) and event.uuid != self._uuid:
            return
        self._put(event)

    def wake(self) -> None:
        """Makes `next_within` return None without waiting for its time."""
        self._put(None)

    def _put(self, event: Event | None) -> None:
        if self._queue.full():
            self._queue.get_nowait()
        self._queue.put_nowait(event)

    async def next(self) -> Event:
        """Waits for the next event."""
        while (event := await self._queue.get()) is None:
            pass
        return event

    async def next_within(self, timeout_s: float) -> Event | None:
        """Returns the next event, or None when the time is up or `wake` was called; one that waits comes at once."""
        if self._queue.empty() and timeout_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    return await self._queue.get()
        return None if self._queue.empty() else self._queue.get_nowait()


class EventHub:
    """Hands events to subscribers. All methods run on the asyncio loop, except `publish_threadsafe`."""

    def __init__(self) -> None:
        self._subscriptions: set[Subscription] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def bind(self) -> None:
        """Ties the hub to the running loop."""
        self._loop = asyncio.get_running_loop()

    @contextlib.contextmanager
    def subscribe(self, uuid: str | None = None) -> Iterator[Subscription]:
        """Gives the events of one domain, or all of them, for as long as the context lasts."""
        subscription = Subscription(uuid)
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    def publish(self, event: Event) -> None:
        """Hands an event to all subscribers."""
        for subscription in tuple(self._subscriptions):
            subscription.offer(event)

    def publish_threadsafe(self, event: Event) -> None:
        """Hands an event over from libvirt's thread."""
        assert self._loop is not None
        # The loop is closed at the process's end, while libvirt's thread still runs.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.publish, event)


def register_events(connection: libvirt.virConnect, slot: str, publish: Callable[[Event], None]) -> Callable[[], None]:
    """Asks libvirt for lifecycle and monitor events of all domains; returns what ends that. Both block.

    Calls `publish` on libvirt's thread.
    """

    def on_lifecycle(
        _connection: libvirt.virConnect, domain: libvirt.virDomain, event: int, _detail: int, _opaque: None
    ) -> None:
        kind = _LIFECYCLE_NAMES.get(event, str(event))
        publish(LifecycleEvent(slot, domain.UUIDString(), domain.name(), kind, time.monotonic()))

    def on_monitor(
        _connection: libvirt.virConnect,
        domain: libvirt.virDomain,
        event: str,
        seconds: int,
        micros: int,
        details: str | None,
        _opaque: None,
    ) -> None:
        data = json.loads(details) if details else {}
        time_s = seconds + micros / 1e6
        publish(MonitorEvent(slot, domain.UUIDString(), event, time_s, data, time.monotonic()))

    lifecycle = connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, on_lifecycle, None)
    monitor = libvirt_qemu.qemuMonitorEventRegister(
        connection,
        None,
        MONITOR_EVENTS,
        on_monitor,
        None,
        libvirt_qemu.VIR_CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER_REGEX,
    )

    def deregister() -> None:
        with contextlib.suppress(libvirt.libvirtError):
            connection.domainEventDeregisterAny(lifecycle)
        with contextlib.suppress(libvirt.libvirtError):
            libvirt_qemu.qemuMonitorEventDeregister(connection, monitor)

    return deregister


def _run_libvirt_loop() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError as error:
            log.error("libvirt's event loop", error=str(error))


_loop_lock = threading.Lock()
_loop_thread: threading.Thread | None = None


def start_libvirt_loop() -> None:
    """Starts the process's libvirt event thread, once; must come before the first connection.

    The thread is a daemon: it lives as long as the process and holds nothing that an exit could damage.
    """
    global _loop_thread  # noqa: PLW0603 - libvirt has one event loop a process
    with _loop_lock:
        if _loop_thread is None:
            libvirt.virEventRegisterDefaultImpl()
            # Errors arrive as exceptions; without this libvirt prints them on stderr as well.
            libvirt.registerErrorHandler(lambda _context, _error: None, None)
            _loop_thread = threading.Thread(target=_run_libvirt_loop, name="libvirt-events", daemon=True)
            _loop_thread.start()


def on_libvirt_loop(fn: Callable[[], None]) -> None:
    """Runs `fn` on libvirt's event thread, some time soon."""

    def once(timer: int, _opaque: None) -> None:
        libvirt.virEventRemoveTimeout(timer)
        fn()

    libvirt.virEventAddTimeout(0, once, None)
