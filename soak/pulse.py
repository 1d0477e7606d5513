"""A datagram to the guest every few milliseconds, and its clock in each answer: when it ran, and that it ran once.

A guest's clock stands still while it is paused, so between the clock here and the guest's lies a distance that only
grows. Each answer puts it between two bounds: the guest read its clock after we sent and before we received. A second
copy, or one of the past, has another distance: the bounds contradict each other.
"""

import socket
import struct
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from handoff_lab.netns import NetNamespace
from handoff_lab.node import Node
from handoff_lab.probe import ECHO_PORT

INTERVAL_S: Final = 0.01
SILENCE_MS: Final = 150.0
"""A shorter silence is the machine's, not the guest's."""
CLOCKS_AGREE_NS: Final = 20_000_000
"""The guest's clock is QEMU's, and may drift this much against ours within a cell."""
_DATAGRAM: Final = struct.Struct("<QQQQ")


@dataclass(frozen=True, slots=True)
class Silence:
    """A time without an answer, by the monotonic clock, in nanoseconds. `ended_ns` is None for one that goes on."""

    began_ns: int
    ended_ns: int | None


class Pulse:
    """Use it as a context; `silences` and `contradiction` may be read at any time."""

    def __init__(self, client: socket.socket, address: str, port: int = ECHO_PORT) -> None:
        """Sends by `client`, a datagram socket that it takes over, to the guest at `address`."""
        self._socket = client
        self._socket.connect((address, port))
        self._socket.settimeout(INTERVAL_S)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"pulse-{address}", daemon=True)
        self._silences: list[Silence] = []
        self._distance_ns: int | None = None
        self.heard_ns = time.monotonic_ns()
        self.answers = 0
        self.contradiction = ""

    @classmethod
    def within(cls, node: Node, address: str, interface: str) -> Self:
        """Sends from an interface of `node`. Raises LabError when that is down."""
        with NetNamespace.of(node) as network:
            return cls(network.socket(kind=socket.SOCK_DGRAM, interface=interface), address)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join()
        self._socket.close()

    def quiet_for_s(self) -> float:
        """Since when there has been no answer."""
        return (time.monotonic_ns() - self.heard_ns) / 1e9

    def silences(self) -> list[Silence]:
        """Those so far of more than SILENCE_MS, the present one too."""
        found = list(self._silences)
        if self.quiet_for_s() * 1000 > SILENCE_MS:
            found.append(Silence(self.heard_ns, None))
        return found

    def outage_ms(self, since_ns: int) -> float | None:
        """From `since_ns`, or from the beginning of a later silence, until the guest answered again: the longest such.

        0 when it was never silent, None while it is.
        """
        outages = [(max(one.began_ns, since_ns), one.ended_ns) for one in self.silences()]
        if any(ended_ns is None for _, ended_ns in outages):
            return None
        return max((max(0, ended_ns - began_ns) / 1e6 for began_ns, ended_ns in outages if ended_ns), default=0.0)

    def silences_ms(self, since_ns: int) -> list[tuple[int, int]]:
        """When each silence began, from `since_ns`, and its length; one that goes on has none."""
        return [
            (round((one.began_ns - since_ns) / 1e6), round(((one.ended_ns or one.began_ns) - one.began_ns) / 1e6))
            for one in self.silences()
        ]

    def _beat(self) -> None:
        number, due = 0, time.monotonic()
        while not self._ending.is_set():
            if time.monotonic() >= due:
                number += 1
                due = max(due + INTERVAL_S, time.monotonic())
                self._send(number)
            self._receive()

    def _send(self, number: int) -> None:
        try:
            self._socket.send(_DATAGRAM.pack(number, time.monotonic_ns(), 0, 0))
        except OSError:
            time.sleep(INTERVAL_S)  # refused while the guest boots

    def _receive(self) -> None:
        try:
            data = self._socket.recv(2048)
        except OSError:
            return
        if len(data) != _DATAGRAM.size:
            return
        now_ns = time.monotonic_ns()
        if now_ns - self.heard_ns > SILENCE_MS * 1e6:
            self._silences.append(Silence(self.heard_ns, now_ns))
        self.heard_ns = now_ns
        self.answers += 1
        _, sent_ns, guest_ns, _ = _DATAGRAM.unpack(data)
        self._judge(sent_ns - guest_ns, now_ns - guest_ns)

    def _judge(self, at_least_ns: int, at_most_ns: int) -> None:
        """The distance of the clocks as an answer bounds it; answers may overtake each other by what they took."""
        farthest_ns = self._distance_ns if self._distance_ns is not None else at_least_ns
        if at_most_ns + CLOCKS_AGREE_NS < farthest_ns and not self.contradiction:
            ahead_ms = (farthest_ns - at_most_ns) / 1e6
            self.contradiction = f"the guest's clock jumped ahead by {ahead_ms:.0f} ms: another copy answered"
        self._distance_ns = max(at_least_ns, farthest_ns)
