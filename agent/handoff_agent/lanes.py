"""Threads that call a libvirtd, each on a line of its own: a connection that serves one call at a time.

libvirt lets threads share a connection, but in Debian 12's 9.0 that can end the process (CVE-2024-4418). One of the
threads waits at the socket for all. When it is told to go, because keep-alive has given the connection up, it leaves a
source in the connection's event loop that points into its stack; the next thread to wait there has it fire. The same
happens when a call comes just while libvirt's event thread sends a keep-alive. So no two threads are ever in one
connection here, and lines have no keep-alive: what a frozen libvirtd was asked, it answers when it is back.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, LifoQueue, SimpleQueue
from typing import TypeVar

import libvirt

from handoff_common.errors import UnavailableError

T = TypeVar("T")


class Line:
    """A connection that is opened when it is needed, and the handles of domains that were looked up with it."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._connection: libvirt.virConnect | None = None
        self._domains: dict[str, libvirt.virDomain] = {}

    @property
    def connection(self) -> libvirt.virConnect:
        """The connection; only inside a call."""
        assert self._connection is not None
        return self._connection

    def domain(self, uuid: str) -> libvirt.virDomain:
        """The handle of a domain. Raises libvirtError."""
        domain = self._domains.get(uuid)
        if domain is None:
            domain = self.connection.lookupByUUIDString(uuid)
            self._domains[uuid] = domain
        return domain

    def forget(self, uuid: str) -> None:
        """Drops the handle of a domain that is gone."""
        self._domains.pop(uuid, None)

    def is_alive(self) -> bool:
        """Whether it is open, as far as is known; asks nobody."""
        return self._connection is not None and bool(self._connection.isAlive())

    def open(self) -> None:
        """Connects, if it is not connected. Blocks as long as libvirtd is frozen. Raises libvirtError."""
        if not self.is_alive():
            self.close()
            self._connection = libvirt.open(self._uri)

    def close(self) -> None:
        """Disconnects."""
        self._domains.clear()
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(libvirt.libvirtError):
                connection.close()


class Lane:
    """As many calls at once as there are lines; more wait their turn.

    Its threads are daemons: one that waits for a frozen libvirtd does not keep the process from ending.
    """

    def __init__(self, name: str, uri: str, lines: int) -> None:
        self._lines = [Line(uri) for _ in range(lines)]
        self._idle: LifoQueue[Line] = LifoQueue()
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        for number, line in enumerate(self._lines):
            self._idle.put(line)
            threading.Thread(target=self._serve, name=f"{name}-{number}", daemon=True).start()

    async def run(self, fn: Callable[[Line], T]) -> T:
        """Runs `fn` with an open line on a thread. Cancelled, it does not wait for a thread that has begun.

        Raises libvirtError, and UnavailableError when there is no libvirtd, or none any more.
        """
        answer: Future[T] = Future()

        def work() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(self._on_line(fn))
            except BaseException as error:  # noqa: BLE001 - it is the caller's
                answer.set_exception(error)

        self._work.put(work)
        return await asyncio.wrap_future(answer)

    def open(self) -> None:
        """Opens the lines that are not in a call, so that the next call need not. Blocks. Raises libvirtError."""
        taken: list[Line] = []
        try:
            with contextlib.suppress(Empty):
                while True:
                    taken.append(self._idle.get_nowait())
            for line in taken:
                line.open()
        finally:
            for line in taken:
                self._idle.put(line)

    def forget(self, uuid: str) -> None:
        """Drops the handles of a domain that is gone."""
        for line in self._lines:
            line.forget(uuid)

    def close(self) -> None:
        """Takes no more calls, and closes each line once it is idle; does not wait."""
        for _ in self._lines:
            self._work.put(None)

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()
        self._idle.get().close()

    def _on_line(self, fn: Callable[[Line], T]) -> T:
        line = self._idle.get()
        try:
            try:
                line.open()
            except libvirt.libvirtError as error:
                raise UnavailableError(f"there is no connection to libvirtd: {error}") from error
            try:
                return fn(line)
            except libvirt.libvirtError as error:
                if line.is_alive():
                    raise
                raise UnavailableError(f"the connection to libvirtd was lost: {error}") from error
        finally:
            self._idle.put(line)
