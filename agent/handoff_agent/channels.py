"""Several connections for one copy between two QEMUs of this host. QEMU makes them itself; we can only break them.

A QEMU that is told to give up while the other one hangs waits for its channels for as long as that takes (10.0). So
they are shut down from outside, through a copy of the other QEMU's descriptors.
"""

import socket
from collections.abc import Iterator
from pathlib import Path

import structlog

from handoff_agent.descriptors import borrowed, holders

log = structlog.get_logger()

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
        for held in holders(inodes):
            try:
                with borrowed(held) as connection:
                    connection.shutdown(socket.SHUT_RDWR)
            except OSError as error:
                log.warning("a channel could not be cut", path=self._path, pid=held.pid, error=str(error))

    def close(self) -> None:
        """Nothing of them is ours."""


def _inodes(path: str) -> Iterator[int]:
    """The sockets bound to a path: the listening one, and the accepted ones."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=_FIELDS - 1)
        if len(fields) == _FIELDS and fields[_PATH_FIELD] == path:
            yield int(fields[_INODE_FIELD])
