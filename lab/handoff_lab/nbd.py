"""A small NBD client: reads and writes an export, a request at a time.

https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, fixed newstyle with NBD_OPT_EXPORT_NAME: no
structured replies, no TLS.
"""

import socket
import struct
from contextlib import suppress
from types import TracebackType
from typing import Self

_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")
_EXPORT = struct.Struct(">QH")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_FIXED_NEWSTYLE, _NO_ZEROES, _EXPORT_NAME = 1, 2, 1
_NEEDED = _FIXED_NEWSTYLE | _NO_ZEROES
_REQUEST_MAGIC, _REPLY_MAGIC = 0x25609513, 0x67446698
_READ, _WRITE, _DISCONNECT, _FLUSH = 0, 1, 2, 3


class NbdClient:
    """A session with one export. Raises OSError when the server refuses, fails a request or goes away."""

    def __init__(self, connection: socket.socket, export: str) -> None:
        """Takes a connected socket over; its time-out counts for each request."""
        self._socket = connection
        self._cookie = 0
        try:
            self.size = self._open(export.encode())
        except BaseException:
            connection.close()
            raise

    def _open(self, name: bytes) -> int:
        magic, option, flags = _GREETING.unpack(self._receive(_GREETING.size))
        if (magic, option) != (b"NBDMAGIC", b"IHAVEOPT") or flags & _NEEDED != _NEEDED:
            raise ConnectionError("this is no NBD server of today")
        self._socket.sendall(struct.pack(">I", _NEEDED) + _OPTION.pack(b"IHAVEOPT", _EXPORT_NAME, len(name)) + name)
        size, _ = _EXPORT.unpack(self._receive(_EXPORT.size))
        return int(size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _DISCONNECT, 0, 0, 0))
        self._socket.close()

    def read(self, offset: int, length: int) -> bytes:
        """Reads; all of it is within the export."""
        self._ask(_READ, offset, length)
        return self._receive(length)

    def write(self, offset: int, data: bytes | bytearray) -> None:
        """Writes; all of it is within the export."""
        self._ask(_WRITE, offset, len(data), data)

    def flush(self) -> None:
        """Returns when everything written is on stable storage."""
        self._ask(_FLUSH, 0, 0)

    def _ask(self, command: int, offset: int, length: int, data: bytes | bytearray = b"") -> None:
        self._cookie += 1
        self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, command, self._cookie, offset, length))
        if data:
            self._socket.sendall(data)
        magic, error, cookie = _REPLY.unpack(self._receive(_REPLY.size))
        if magic != _REPLY_MAGIC or cookie != self._cookie:
            raise ConnectionError("the NBD server's reply makes no sense")
        if error:
            raise OSError(error, f"the NBD server failed the request with error {error}")

    def _receive(self, length: int) -> bytes:
        received = bytearray(length)
        view = memoryview(received)
        while view:
            count = self._socket.recv_into(view)
            if count == 0:
                raise ConnectionError("the NBD server has closed the connection")
            view = view[count:]
        return bytes(received)


def connect_unix(path: str, export: str, timeout_s: float) -> NbdClient:
    """Opens an export of a server on this machine. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(timeout_s)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return NbdClient(connection, export)
