"""Sockets inside of a node's network, for a program that runs outside of it."""

import asyncio
import ctypes
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from handoff_lab.node import Node

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class NetNamespace:
    """A network namespace, kept by a descriptor: the node's pid may be reused, this can't be.

    A socket stays in the namespace that it was made in, whatever thread uses it.
    """

    def __init__(self, descriptor: int) -> None:
        """Takes over an open descriptor of a /proc/PID/ns/net."""
        self._descriptor = descriptor

    @classmethod
    def of(cls, node: Node) -> "NetNamespace":
        """The network of a node. Raises LabError when it is down."""
        return cls(os.open(f"/proc/{node.require_pid()}/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    def __enter__(self) -> "NetNamespace":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the namespace; its sockets stay."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def socket(
        self,
        family: socket.AddressFamily = socket.AF_INET,
        kind: socket.SocketKind = socket.SOCK_STREAM,
        *,
        interface: str = "",
    ) -> socket.socket:
        """A new socket in the namespace, of one interface there if need be. Raises OSError."""

        def make() -> socket.socket:
            _enter(self._descriptor)
            made = socket.socket(family, kind)
            try:
                if interface:
                    made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
            except OSError:
                made.close()
                raise
            return made

        # setns moves one thread; this one ends right after, so that no other code ever runs in the namespace.
        with ThreadPoolExecutor(max_workers=1) as pool:
            return pool.submit(make).result()

    async def connect(
        self, host: str, port: int, timeout_s: float = 5.0, *, interface: str = ""
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Opens a TCP connection from inside of the namespace. Raises OSError, TimeoutError."""
        client = self.socket(interface=interface)
        client.setblocking(False)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.get_running_loop().sock_connect(client, (host, port))
                return await asyncio.open_connection(sock=client)
        except BaseException:
            client.close()
            raise


def _enter(namespace: int) -> None:
    """Moves the calling thread into a network namespace. Raises OSError."""
    if _libc.setns(namespace, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")
