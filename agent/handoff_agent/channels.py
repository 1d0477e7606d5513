"""Several connections for one copy between two QEMUs of this host. QEMU makes them itself; we can only break them.

A QEMU that is told to give up while the other one hangs waits for its channels for as long as that takes (10.0). So
they are shut down from outside, through a copy of the other QEMU's descriptors.
"""

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import structlog

log = structlog.get_logger()

# The same number on every architecture; Python has no function for it.
_PIDFD_GETFD: Final = 438
_PATH_FIELD, _INODE_FIELD, _FIELDS = 7, 6, 8


class LocalChannels:
    """The connections to the Unix socket of one handoff, whoever made them."""

    def __init__(self, path: str) -> None:
        self._path = path

    def cut(self) -> None:
        """Ends them all at once, for both sides; does nothing when there are none. Takes some milliseconds."""
        inodes = set(_inodes(self._path))
        if not inodes:
            return
        for pid, fd in _holders(inodes):
            try:
                _shut_down(pid, fd)
            except OSError as error:
                log.warning("a channel could not be cut", path=self._path, pid=pid, error=error.strerror)

    def close(self) -> None:
        """Nothing of them is ours."""


def _inodes(path: str) -> Iterator[int]:
    """The sockets bound to a path: the listening one, and the accepted ones."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=_FIELDS - 1)
        if len(fields) == _FIELDS and fields[_PATH_FIELD] == path:
            yield int(fields[_INODE_FIELD])


def _holders(inodes: set[int]) -> Iterator[tuple[int, int]]:
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        # Processes end while we look.
        with contextlib.suppress(OSError):
            for descriptor in os.scandir(f"/proc/{entry.name}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(descriptor.path) in wanted:  # noqa: PTH115 - thousands of them, in a hurry
                        yield int(entry.name), int(descriptor.name)


def _shut_down(pid: int, fd: int) -> None:
    process = os.pidfd_open(pid)
    try:
        copy = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, process, fd, 0)
        if copy < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        with socket.socket(fileno=copy) as ours:
            ours.shutdown(socket.SHUT_RDWR)
    finally:
        os.close(process)
