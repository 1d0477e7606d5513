"""Sockets of other processes of this host, through copies of their descriptors. Needs root."""

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

# The same number on every architecture; Python has no function for it.
_PIDFD_GETFD: Final = 438


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Somebody's socket."""

    pid: int
    fd: int
    inode: int


def holders(inodes: AbstractSet[int]) -> Iterator[Descriptor]:
    """Who has these sockets open. Looks at all processes: some milliseconds."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        # Processes end while we look.
        with contextlib.suppress(OSError):
            for descriptor in os.scandir(f"/proc/{entry.name}/fd"):
                with contextlib.suppress(OSError):
                    inode = wanted.get(os.readlink(descriptor.path))  # noqa: PTH115 - thousands of them, in a hurry
                    if inode is not None:
                        yield Descriptor(int(entry.name), int(descriptor.name), inode)


@contextlib.contextmanager
def borrowed(descriptor: Descriptor) -> Iterator[socket.socket]:
    """A copy of the socket, for a moment: while we have it, its owner can't close the connection by ending.

    Raises OSError; FileNotFoundError when the descriptor is another file by now.
    """
    process = os.pidfd_open(descriptor.pid)
    try:
        copy = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, process, descriptor.fd, 0)
        if copy < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(process)
    if os.fstat(copy).st_ino != descriptor.inode:
        os.close(copy)
        raise FileNotFoundError(f"descriptor {descriptor.fd} of process {descriptor.pid} is another file")
    with socket.socket(fileno=copy) as ours:
        yield ours
