"""What QEMU sends over a connection, and how fast it may: by the kernel, on QEMU's own socket.

The rate of a block job counts what the job goes through, zeros as well, which are not sent. TCP's pacing
(SO_MAX_PACING_RATE) counts what is sent, and without bursts. It stays with the connection when the agent is restarted.
"""

import ipaddress
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from handoff_agent.descriptors import Descriptor, borrowed, holders

# Python has no names for these; the numbers are those of x86, ARM, POWER, RISC-V and s390.
_SO_MAX_PACING_RATE: Final = 47
_BYTES_SENT: Final = slice(200, 208)  # of struct tcp_info, since Linux 4.19
_UNBOUND: Final = (1 << 64) - 1
_ESTABLISHED: Final = "01"
_REMOTE_FIELD, _STATE_FIELD, _INODE_FIELD = 2, 3, 9
_RATE: Final = struct.Struct("=Q")


def find(host: str, port: int) -> tuple[Descriptor, ...]:
    """The connections of this host to an address and port, whoever has them open. Takes some milliseconds.

    Raises OSError and ValueError.
    """
    return tuple(holders(set(_inodes(_as_in_proc(host, port)))))


def sent_bytes(flow: Descriptor) -> int:
    """All that it has sent, repetitions too. Raises OSError when it is gone, or the kernel won't tell."""
    with borrowed(flow) as connection:
        told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_SENT.stop)
    if len(told) < _BYTES_SENT.stop:
        raise OSError("this kernel does not count what a connection sends")
    return int(_RATE.unpack(told[_BYTES_SENT])[0])


def bound(flow: Descriptor, bytes_per_s: int) -> None:
    """Bounds its rate from now on; 0: no bound. Raises OSError when it is gone."""
    with borrowed(flow) as connection:
        connection.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, _RATE.pack(bytes_per_s or _UNBOUND))


def allowed_bytes_per_s(flow: Descriptor) -> int:
    """Its bound; 0: it has none. Raises OSError when it is gone."""
    with borrowed(flow) as connection:
        told = connection.getsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, _RATE.size)
    rate = int(_RATE.unpack(told)[0])
    return 0 if rate == _UNBOUND else rate


def _inodes(remotes: frozenset[str]) -> Iterator[int]:
    for table in ("tcp", "tcp6"):
        path = Path("/proc/net", table)
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if (
                fields[_REMOTE_FIELD] in remotes
                and fields[_STATE_FIELD] == _ESTABLISHED
                and fields[_INODE_FIELD] != "0"
            ):
                yield int(fields[_INODE_FIELD])


def _as_in_proc(host: str, port: int) -> frozenset[str]:
    """As in /proc/net/tcp and tcp6, where a socket for both may have an IPv4 address."""
    address = ipaddress.ip_address(host)
    packed = [address.packed]
    if address.version == 4:
        packed.append(bytes(10) + b"\xff\xff" + address.packed)
    return frozenset(f"{_hex(each)}:{port:04X}" for each in packed)


def _hex(packed: bytes) -> str:
    words = (packed[n : n + 4] for n in range(0, len(packed), 4))
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
