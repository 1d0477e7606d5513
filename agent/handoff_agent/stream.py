"""The connection that carries a guest's memory; QEMU gets a copy of its descriptor, the agent keeps one.

QEMU can sit in a write for minutes when the link dies in the pause. A shutdown() on any descriptor of the connection
ends that write at once.
"""

import asyncio
import contextlib
import socket
from typing import Final, Protocol

from handoff_agent.local_sockets import UNIX
from handoff_common.errors import InvalidArgumentError, UnavailableError

CONNECT_TIMEOUT_S: Final = 5.0
# How long what was sent may stay unacknowledged before the kernel gives the connection up.
USER_TIMEOUT_MS: Final = 10_000


def parse_uri(uri: str) -> tuple[str, int]:
    """Splits "tcp:HOST:PORT" ("tcp:[ADDRESS]:PORT" for IPv6). Raises InvalidArgumentError."""
    scheme, _, rest = uri.partition(":")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not port.isdecimal():
        raise InvalidArgumentError(f"{uri!r} is not tcp:HOST:PORT")
    return host.strip("[]"), int(port)


class Connection(Protocol):
    """What carries a guest's memory, as far as it must be broken."""

    def cut(self) -> None:
        """Ends it at once for all who hold it; does nothing when it has ended."""

    def close(self) -> None:
        """Gives up what is ours of it; it lives on as long as QEMU has its own."""


class Stream:
    """A connected socket. `close` it when the transfer is over."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    @classmethod
    async def connect(cls, uri: str) -> "Stream":
        """Connects to "tcp:…" or "unix:PATH".

        Raises UnavailableError when there is no answer in time, InvalidArgumentError for a bad URI.
        """
        if uri.startswith(UNIX):
            return cls(await _connect_unix(uri.removeprefix(UNIX)))
        host, port = parse_uri(uri)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                family, kind, protocol, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
                connection = socket.socket(family, kind, protocol)
                try:
                    connection.setblocking(False)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
                    await loop.sock_connect(connection, address)
                    connection.setblocking(True)
                except BaseException:
                    connection.close()
                    raise
        except TimeoutError:
            raise UnavailableError(f"the destination at {uri} did not answer within {CONNECT_TIMEOUT_S:g} s") from None
        except OSError as error:
            raise UnavailableError(f"the destination at {uri} can't be reached: {error.strerror}") from None
        return cls(connection)

    def fileno(self) -> int:
        """Our descriptor."""
        return self._socket.fileno()

    def cut(self) -> None:
        """Ends the connection at once for all who hold it; does nothing when it has ended."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives up our descriptor; the connection lives on as long as QEMU has its own."""
        self._socket.close()


async def _connect_unix(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.setblocking(False)
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await asyncio.get_running_loop().sock_connect(connection, path)
        connection.setblocking(True)
    except TimeoutError:
        connection.close()
        raise UnavailableError(f"the new QEMU at {path} did not answer within {CONNECT_TIMEOUT_S:g} s") from None
    except OSError as error:
        connection.close()
        raise UnavailableError(f"the new QEMU at {path} can't be reached: {error.strerror}") from None
    except BaseException:
        connection.close()
        raise
    return connection
