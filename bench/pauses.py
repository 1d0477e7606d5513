"""How long a guest's CPUs stood still in a move, by the word of both QEMUs.

QEMU stamps STOP and RESUME with the host's clock, which the hosts of a lab share; so the figure is the same thing for
our migration and for libvirt's own, and does not depend on either's statistics. The same goes for the states of a
migration, where QEMU was told to announce them.
"""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import libvirt
import libvirt_qemu

_started = threading.Event()


def _run_events() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


def _start_events() -> None:
    if not _started.is_set():
        _started.set()
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run_events, name="libvirt-events", daemon=True).start()


class PauseWatch:
    """Collects STOP and RESUME of one guest on several hosts, and the states of its migration: "MIGRATION device"."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._heard: list[tuple[str, str, float]] = []

    def note(self, host: str, event: str, time_s: float) -> None:
        """Takes an event in, on libvirt's thread."""
        with self._changed:
            self._heard.append((host, event, time_s))
            self._changed.notify_all()

    def clear(self) -> None:
        """Forgets what was seen so far."""
        with self._changed:
            self._heard.clear()

    def pause_ms(self, source: str, destination: str, deadline_s: float = 5.0) -> float:
        """From the last STOP at the source to the first RESUME at the destination. Raises TimeoutError without both."""
        stopped_s, resumed_s = self.ends(source, destination, deadline_s)
        return 1000 * (resumed_s - stopped_s)

    def last(self, host: str, event: str) -> float | None:
        """When it happened on that host last, on the wall clock; None when it did not."""
        with self._changed:
            return next((time_s for at, what, time_s in reversed(self._heard) if (at, what) == (host, event)), None)

    def ends(self, source: str, destination: str, deadline_s: float = 5.0) -> tuple[float, float]:
        """When the pause began and ended, on the wall clock. Raises TimeoutError as `pause_ms` does."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._both(source, destination) is not None, deadline_s):
                raise TimeoutError(f"no STOP on {source} and RESUME on {destination}: {self._heard}")
            both = self._both(source, destination)
            assert both is not None
            return both

    def resumed_s(self, destination: str, deadline_s: float = 5.0) -> float:
        """When the destination was first resumed, as time.time() says it. Raises TimeoutError when it was not."""

        def resumes() -> list[float]:
            return [time_s for host, event, time_s in self._heard if (host, event) == (destination, "RESUME")]

        with self._changed:
            if not self._changed.wait_for(resumes, deadline_s):
                raise TimeoutError(f"no RESUME on {destination}: {self._heard}")
            return resumes()[0]

    def _both(self, source: str, destination: str) -> tuple[float, float] | None:
        stops = [time_s for host, event, time_s in self._heard if (host, event) == (source, "STOP")]
        resumes = [time_s for host, event, time_s in self._heard if (host, event) == (destination, "RESUME")]
        return (stops[-1], resumes[0]) if stops and resumes else None


@contextmanager
def watch_pauses(guest: str, sockets: Mapping[str, Path]) -> Iterator[PauseWatch]:
    """Watches the guest by name; `sockets`: libvirt's socket of each host."""
    _start_events()
    watch = PauseWatch()
    connections: list[libvirt.virConnect] = []

    try:
        for host, socket in sockets.items():
            connection = libvirt.open(f"qemu+unix:///system?socket={socket}")
            connections.append(connection)
            libvirt_qemu.qemuMonitorEventRegister(
                connection,
                None,
                "^(STOP|RESUME|MIGRATION)$",
                _Callback(guest, host, watch),
                None,
                libvirt_qemu.VIR_CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER_REGEX,
            )
        yield watch
    finally:
        for connection in connections:
            connection.close()


class _Callback:
    def __init__(self, guest: str, host: str, watch: PauseWatch) -> None:
        self._guest = guest
        self._host = host
        self._watch = watch

    def __call__(
        self,
        _connection: libvirt.virConnect,
        domain: libvirt.virDomain,
        event: str,
        seconds: int,
        micros: int,
        details: str | None,
        _opaque: None,
    ) -> None:
        if domain.name() == self._guest:
            state = f" {json.loads(details)['status']}" if event == "MIGRATION" and details else ""
            self._watch.note(self._host, event + state, seconds + micros / 1e6)
