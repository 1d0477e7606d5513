"""A qemu-storage-daemon that gives images of this host to one other host, for as long as a handoff lasts.

    folder/pid    its process, which outlives the agent
    folder/qmp    its monitor

Everything that is known of it is in its folder, on a memory file system: an agent that was restarted finds it again,
and after a reboot neither is there.
"""

import asyncio
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from handoff_agent.children import WITH_US
from handoff_agent.disks.uris import ExportUri
from handoff_agent.monitor import Json
from handoff_common.errors import DeadlineError, ExhaustedError, PreconditionError

START_TIMEOUT_S: Final = 10.0
END_TIMEOUT_S: Final = 5.0
QUIT_TIMEOUT_S: Final = 1.0
_BINARY: Final = "qemu-storage-daemon"
_IN_USE: Final = "Address already in use"


@dataclass(frozen=True, slots=True)
class Export:
    """One image, and the name that others know it by."""

    name: str
    path: str
    format: str
    writable: bool


@dataclass(frozen=True, slots=True)
class Address:
    """Where exports may listen."""

    host: str
    first_port: int
    last_port: int


def find_binary(emulator: str) -> str:
    """The storage daemon that came with a QEMU build, or the system's. Raises PreconditionError without any."""
    prefix = Path(emulator).resolve().parent
    for candidate in (prefix / _BINARY, prefix.parent / "usr/bin" / _BINARY) if emulator else ():
        if os.access(candidate, os.X_OK):
            return str(candidate)
    found = shutil.which(_BINARY)
    if found is None:
        raise PreconditionError(f"this host has no {_BINARY}, which takes disks in; install it beside QEMU")
    return found


class StorageDaemon:
    """The daemon of one folder, whether or not it runs."""

    def __init__(self, folder: Path, threads: Executor) -> None:
        """What blocks is done on `threads`."""
        self._folder = folder
        self._threads = threads

    async def start(
        self, binary: str, exports: Sequence[Export], address: Address, *, tls_credentials: str = ""
    ) -> dict[str, str]:
        """Exports the images on one port; returns the URI of each by its name.

        `tls_credentials`: folder with x509 credentials; empty: no TLS. Raises ExhaustedError when no port is free, and
        PreconditionError when an image can't be opened.
        """
        await self.stop()
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, self._start, binary, exports, address, tls_credentials
        )

    async def stop(self) -> None:
        """Ends it, with its exports and its locks on images; does nothing when there is none. Raises DeadlineError."""
        await asyncio.get_running_loop().run_in_executor(self._threads, self._stop)

    @property
    def pid(self) -> int | None:
        """Its process, if it runs."""
        try:
            pid = int((self._folder / "pid").read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return pid if os.fsencode(self._folder / "qmp") in command else None

    def _start(self, binary: str, exports: Sequence[Export], address: Address, tls_credentials: str) -> dict[str, str]:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for port in _free_ports(address):
            # Until it has become a daemon: one that is not, and can't tell its starter, ends by itself.
            command = [*WITH_US, binary, *self._arguments(exports, address.host, port, tls_credentials)]
            try:
                done = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    timeout=START_TIMEOUT_S,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                self._stop()
                raise PreconditionError(f"{_BINARY} could not be started: {error}") from None
            if done.returncode == 0:
                tls = bool(tls_credentials)
                return {each.name: str(ExportUri(address.host, port, each.name, tls=tls)) for each in exports}
            if _IN_USE not in done.stderr:
                self._forget()
                raise PreconditionError(f"{_BINARY}: {done.stderr.strip()[-300:]}")
        self._forget()
        raise ExhaustedError(
            f"no free port for disks on {address.host}, ports {address.first_port} to {address.last_port}"
        )

    def _arguments(self, exports: Sequence[Export], host: str, port: int, tls_credentials: str) -> Iterator[str]:
        yield from ("--daemonize", "--pidfile", str(self._folder / "pid"))
        yield from ("--chardev", f"socket,id=qmp,path={self._folder / 'qmp'},server=on,wait=off")
        yield from ("--monitor", "chardev=qmp")
        server = f"addr.type=inet,addr.host={host},addr.port={port}"
        if tls_credentials:
            yield from ("--object", f"tls-creds-x509,id=tls,endpoint=server,verify-peer=on,dir={tls_credentials}")
            server = f"{server},tls-creds=tls"
        for number, export in enumerate(exports):
            for node in _nodes(number, export):
                yield from ("--blockdev", json.dumps(node))
        yield from ("--nbd-server", server)
        for number, export in enumerate(exports):
            yield "--export"
            yield json.dumps(
                {
                    "type": "nbd",
                    "id": f"export{number}",
                    "node-name": f"image{number}",
                    "name": export.name,
                    "writable": export.writable,
                }
            )

    def _stop(self) -> None:
        pid = self.pid
        if pid is not None:
            try:
                handle = os.pidfd_open(pid)
            except ProcessLookupError:
                handle = -1
            if handle >= 0:
                try:
                    self._end(handle)
                finally:
                    os.close(handle)
        self._forget()

    def _forget(self) -> None:
        """Removes the folder, and that of its handoff if it was the last there."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._folder.parent.rmdir()

    def _end(self, handle: int) -> None:
        """`quit` writes out what the images' tables lack; one that hangs is killed."""
        self._say_quit()
        if _ends_within(handle, QUIT_TIMEOUT_S):
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        if not _ends_within(handle, END_TIMEOUT_S):
            raise DeadlineError(f"{_BINARY} {self.pid} does not end; look at it on this host")

    def _say_quit(self) -> None:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(QUIT_TIMEOUT_S)
            monitor.connect(str(self._folder / "qmp"))
            monitor.sendall(b'{"execute": "qmp_capabilities"}{"execute": "quit"}')
            while monitor.recv(1 << 12):
                pass


def _nodes(number: int, export: Export) -> Iterator[Mapping[str, Json]]:
    sparse: Mapping[str, Json] = {"discard": "unmap", "detect-zeroes": "unmap"} if export.writable else {}
    read_only = {"read-only": not export.writable}
    yield {"driver": "file", "node-name": f"file{number}", "filename": export.path, "discard": "unmap", **read_only}
    yield {"driver": export.format, "node-name": f"image{number}", "file": f"file{number}", **read_only, **sparse}


def _free_ports(address: Address) -> Iterator[int]:
    for port in range(address.first_port, address.last_port + 1):
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address.host, port))
                probe.listen(1)
            except OSError:
                continue
        yield port


def _ends_within(handle: int, timeout_s: float) -> bool:
    return bool(select.select([handle], [], [], timeout_s)[0])
