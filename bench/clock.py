"""How long a guest's own clock stood still.

Under TCG the guest's clock is QEMU's virtual clock: it stops with the CPUs and goes on where it stopped. So the pause
that the guest itself has lived through is by how much its clock is further behind the host's afterwards than before.
"""

import asyncio
import socket
import struct
import time

from handoff_lab.netns import NetNamespace
from handoff_lab.node import Node
from handoff_lab.probe import ECHO_PORT

SAMPLES = 200
INTERVAL_S = 0.002
ANSWER_S = 0.5
_CLOCK = slice(16, 24)


async def clock_lag_ms(node: Node, address: str) -> float:
    """How far the guest's clock is behind the host's, by the quickest of SAMPLES echoes; good to half their time."""
    return await asyncio.to_thread(_clock_lag_ms, node, address)


def _clock_lag_ms(node: Node, address: str) -> float:
    with NetNamespace.of(node) as network:
        client = network.socket(kind=socket.SOCK_DGRAM)
    best: tuple[int, float] | None = None
    with client:
        client.settimeout(ANSWER_S)
        client.connect((address, ECHO_PORT))
        for number in range(SAMPLES):
            sent_ns = time.monotonic_ns()
            client.send(struct.pack("<QQQ", number, sent_ns, 0))
            try:
                answer = client.recv(100)
                while struct.unpack_from("<Q", answer)[0] != number:
                    answer = client.recv(100)
            except TimeoutError:
                continue
            received_ns = time.monotonic_ns()
            (guest_ns,) = struct.unpack("<Q", answer[_CLOCK])
            lag_ms = ((sent_ns + received_ns) / 2 - guest_ns) / 1e6
            if best is None or received_ns - sent_ns < best[0]:
                best = (received_ns - sent_ns, lag_ms)
            time.sleep(INTERVAL_S)
    if best is None:
        raise TimeoutError(f"{address} answers no echo")
    return best[1]
