"""What judges a move from outside the guest: a 1 ms UDP probe, pings, a TCP session checked byte by byte, and a client
of the guest's control port. All run in the network of a node: a host that takes no part in the move, or the gateway.

In two networks with the same addresses, a judge names its `interface` in the guest's (see networks.py).

    async with UdpProbe(lab, node, guest.ip) as udp, TcpSession(node, guest.ip) as tcp:
        ...                                   # the move
    udp.result().longest_gap_ms, tcp.result().longest_silence_ms
"""

import asyncio
import json
import socket
import struct
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypedDict

from handoff_lab.errors import LabError
from handoff_lab.netns import NetNamespace
from handoff_lab.node import Node
from handoff_lab.state import Lab

ECHO_PORT = 7
COUNTER_PORT = 9
CONTROL_PORT = 5000
CONTROL_DEADLINE_S = 30.0
CLOCK_S = 1.0


@dataclass(frozen=True, slots=True)
class Gap:
    """A silence: when it began, on the machine's wall clock, and its length."""

    began_at_s: float
    length_ms: float


@dataclass(frozen=True, slots=True)
class ClockReading:
    """By an answer that came at `at_s` after `took_ms`, our wall clock is ahead of the guest's own by `ahead_ns`."""

    at_s: float
    took_ms: float
    ahead_ns: int


@dataclass(frozen=True, slots=True)
class Standstill:
    """For how long the guest's own clock stood still, good to `inexact_ms`, and what it showed when it stopped."""

    length_ms: float
    inexact_ms: float
    guest_ns: int


@dataclass(frozen=True, slots=True)
class UdpResult:
    """What a UdpProbe or PingProbe saw. `late`: answers that came after the answer to a later datagram. `waited`: those
    that took at least as long as a gap.

    `clock`: one reading each tenth of a second, in their order; none from pings. `unanswered`: when the first thousand
    of those were sent, in seconds of the wall clock.
    """

    sent: int
    received: int
    duplicated: int
    late: int
    longest_gap: Gap
    gaps: tuple[Gap, ...]
    mean_ms: float
    slowest_ms: float
    waited: int
    clock: tuple[ClockReading, ...]
    unanswered: tuple[float, ...]

    @property
    def lost(self) -> int:
        """Datagrams that were never answered."""
        return self.sent - self.received

    @property
    def longest_gap_ms(self) -> float:
        """The longest time between two answers."""
        return self.longest_gap.length_ms

    def standstill(self, began_s: float, ended_s: float) -> Standstill | None:
        """Of a guest that was stopped then, on the wall clock; by the quickest answers in the second before and after.

        None without answers.
        """
        before = [each for each in self.clock if began_s - CLOCK_S <= each.at_s <= began_s]
        after = [each for each in self.clock if ended_s <= each.at_s <= ended_s + CLOCK_S]
        if not before or not after:
            return None
        then, now = (min(readings, key=lambda each: each.took_ms) for readings in (before, after))
        return Standstill(
            length_ms=(now.ahead_ns - then.ahead_ns) / 1e6,
            inexact_ms=(now.took_ms + then.took_ms) / 2,
            guest_ns=int(began_s * 1e9) - then.ahead_ns,
        )


class UdpProbe:
    """Sends a datagram every `interval_us` to the guest's echo, from a program of its own with real-time priority.

    So our own scheduling is not measured. `gaps` in the result are the silences of at least `gap_ms`.
    """

    port = ECHO_PORT

    def __init__(
        self,
        lab: Lab,
        node: Node,
        address: str,
        interval_us: int = 1000,
        gap_ms: float = 20.0,
        *,
        interface: str = "",
    ) -> None:
        """Prepares a probe from `node` to `address`; `async with` starts it."""
        self._command = [
            *("nsenter", "-t", str(node.require_pid()), "-n", "--", str(lab.probe_program)),
            *(address, str(self.port), str(interval_us), str(int(gap_ms * 1000)), *filter(None, [interface])),
        ]
        self._process: asyncio.subprocess.Process | None = None
        self._result: UdpResult | None = None

    async def __aenter__(self) -> Self:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe, stderr=pipe)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> UdpResult:
        """Waits half a second for late answers and returns the result. Raises LabError when the probe failed."""
        if self._result is not None:
            return self._result
        if self._process is None:
            raise LabError("the probe was not started")
        try:
            async with asyncio.timeout(10):
                output, errors = await self._process.communicate(b"")  # its standard input ends: it stops
        except BaseException:
            self._process.kill()
            await self._process.wait()
            raise
        if self._process.returncode != 0:
            raise LabError(f"the probe failed: {errors.decode().strip()}")
        self._result = _udp_result(json.loads(output))
        return self._result

    def result(self) -> UdpResult:
        """The result, after the probe was stopped."""
        if self._result is None:
            raise LabError("the probe still runs: stop it first")
        return self._result


class PingProbe(UdpProbe):
    """As UdpProbe, but answered by the guest's kernel."""

    port = 0


class _Raw(TypedDict):
    """What the program prints."""

    sent: int
    received: int
    duplicated: int
    late: int
    waited: int
    longest_gap_ns: int
    longest_gap_at_ns: int
    slowest_ns: int
    mean_ns: int
    gaps: list[tuple[int, int]]
    clock: list[tuple[int, int, int]]
    unanswered: list[int]


def _udp_result(raw: _Raw) -> UdpResult:
    return UdpResult(
        sent=raw["sent"],
        received=raw["received"],
        duplicated=raw["duplicated"],
        late=raw["late"],
        longest_gap=Gap(raw["longest_gap_at_ns"] / 1e9, raw["longest_gap_ns"] / 1e6),
        gaps=tuple(Gap(at_ns / 1e9, length_ns / 1e6) for at_ns, length_ns in raw["gaps"]),
        mean_ms=raw["mean_ns"] / 1e6,
        slowest_ms=raw["slowest_ns"] / 1e6,
        waited=raw["waited"],
        clock=tuple(ClockReading(at_ns / 1e9, took_ns / 1e6, ahead_ns) for at_ns, took_ns, ahead_ns in raw["clock"]),
        unanswered=tuple(sent_ns / 1e9 for sent_ns in raw["unanswered"]),
    )


@dataclass(frozen=True, slots=True)
class TcpResult:
    """What a TcpSession saw. `error`: why it ended before it was closed; None when it survived."""

    survived: bool
    error: str | None
    counters: int
    wrong: int
    longest_silence: Gap

    @property
    def longest_silence_ms(self) -> float:
        """The longest time without a byte."""
        return self.longest_silence.length_ms


class TcpSession:
    """Holds one TCP session to the guest's counter: every byte must be the next of 1, 2, 3, … as 8 little-endian bytes.

    The reader is a thread, so that a busy event loop does not look like silence.
    """

    def __init__(
        self,
        node: Node,
        address: str,
        interval_us: int = 5000,
        connect_timeout_s: float = 10.0,
        *,
        interface: str = "",
    ) -> None:
        """Prepares a session from `node` to `address`; `async with` opens it."""
        self._node = node
        self._address = address
        self._interval_us = interval_us
        self._connect_timeout_s = connect_timeout_s
        self._interface = interface
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._socket: socket.socket | None = None
        self._buffer = b""
        self._counters = 0
        self._wrong = 0
        self._error: str | None = None
        self._longest = Gap(0.0, 0.0)
        self._heard_ns = 0

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._open)
        self._thread = threading.Thread(target=self._read, name=f"tcp-session-{self._address}", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _open(self) -> None:
        with NetNamespace.of(self._node) as network:
            client = network.socket(interface=self._interface)
        try:
            client.settimeout(self._connect_timeout_s)
            client.connect((self._address, COUNTER_PORT))
            client.sendall(struct.pack("<I", self._interval_us))
            client.settimeout(0.2)
        except BaseException:
            client.close()
            raise
        self._socket = client
        self._heard_ns = time.monotonic_ns()

    def _read(self) -> None:
        assert self._socket is not None
        while not self._closing.is_set():
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                self._note_silence(time.monotonic_ns())
                continue
            except OSError as error:
                self._error = str(error)
                return
            if not data:
                self._error = "the guest closed the session"
                return
            now = time.monotonic_ns()
            self._note_silence(now)
            self._heard_ns = now
            self._check(data)

    def _note_silence(self, now_ns: int) -> None:
        silence_ms = (now_ns - self._heard_ns) / 1e6
        if silence_ms > self._longest.length_ms:
            self._longest = Gap(time.time() - silence_ms / 1e3, silence_ms)

    def _check(self, data: bytes) -> None:
        data = self._buffer + data
        whole = len(data) - len(data) % 8
        for (value,) in struct.iter_unpack("<Q", data[:whole]):
            self._counters += 1
            self._wrong += value != self._counters
        self._buffer = data[whole:]

    @property
    def counters(self) -> int:
        """Counters received so far."""
        return self._counters

    async def close(self) -> TcpResult:
        """Ends the session and returns the result."""
        self._closing.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            self._thread = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        return self.result()

    def result(self) -> TcpResult:
        """What was seen so far."""
        survived = self._error is None and self._wrong == 0
        return TcpResult(survived, self._error, self._counters, self._wrong, self._longest)


@dataclass(frozen=True, slots=True)
class NetCounts:
    """What the guest's services did."""

    udp_echoed: int
    echo_sessions: int
    counter_sessions: int


@dataclass(frozen=True, slots=True)
class Ticks:
    """The guest's tick recorder. Its clock stands still while it is paused: gaps are stalls, not pauses."""

    ticks: int
    longest_gap_us: int
    longest_gap_at_ns: int


@dataclass(frozen=True, slots=True)
class Stall:
    """The guest ticked, and for at least 3 ms not again; by its own clock, which stands still in a pause."""

    began_ns: int
    length_ns: int


@dataclass(frozen=True, slots=True)
class DirtyStatus:
    """The memory dirtier. Any `bad_pages` are writes that were lost."""

    working_set_mib: int
    rate_mib_per_s: float
    passes: int
    written_pages: int
    verified_pages: int
    bad_pages: int


@dataclass(frozen=True, slots=True)
class JournalStatus:
    """The disk journal's writer. Records up to `acked_seq` are on the disk, or lost."""

    running: bool
    device: str
    rate_mib_per_s: float
    epoch: int
    slots: int
    acked_seq: int
    write_errors: int
    last_errno: int
    slowest_write_us: int


@dataclass(frozen=True, slots=True)
class JournalCheck:
    """What the guest found when it reread its journal."""

    epoch: int
    acked_seq: int
    checked: int
    lost: int
    torn: int
    misplaced: int
    unreadable: int
    write_errors: int
    first_bad_seq: int

    @property
    def intact(self) -> bool:
        """Whether every acknowledged record is there."""
        return not (self.lost or self.torn or self.misplaced or self.unreadable or self.write_errors)


@dataclass(frozen=True, slots=True)
class GuestStatus:
    """Everything that the guest's program says of itself. Another boot_id: it has rebooted."""

    boot_id: str
    monotonic_ns: int
    net: NetCounts
    ticks: Ticks
    dirty: DirtyStatus
    journal: JournalStatus


class GuestControl:
    """Client of the guest's control port. Every call is a connection of its own, with a deadline.

    Calls raise LabError when the guest refuses, OSError or TimeoutError when it does not answer.
    """

    def __init__(
        self, node: Node, address: str, deadline_s: float = CONTROL_DEADLINE_S, *, interface: str = ""
    ) -> None:
        """Talks from `node` to the guest at `address`."""
        self._node = node
        self._address = address
        self._deadline_s = deadline_s
        self._interface = interface

    async def call(self, command: str) -> bytes:
        """Sends one line and returns the answer, JSON."""
        async with asyncio.timeout(self._deadline_s):
            with NetNamespace.of(self._node) as network:
                reader, writer = await network.connect(
                    self._address, CONTROL_PORT, self._deadline_s, interface=self._interface
                )
            try:
                writer.write(f"{command}\n".encode())
                await writer.drain()
                answer = await reader.readline()
            finally:
                writer.close()
        if not answer.endswith(b"\n"):
            raise LabError(f"{self._address}: the guest hung up on `{command}`")
        problem = json.loads(answer).get("error")
        if problem is not None:
            raise LabError(f"{self._address}: `{command}`: {problem}")
        return answer

    async def status(self) -> GuestStatus:
        """Everything at once."""
        raw = json.loads(await self.call("status"))
        return GuestStatus(
            boot_id=raw["boot_id"],
            monotonic_ns=raw["monotonic_ns"],
            net=NetCounts(**raw["net"]),
            ticks=Ticks(**raw["ticks"]),
            dirty=DirtyStatus(**raw["dirty"]),
            journal=JournalStatus(**raw["journal"]),
        )

    async def dirty(self, working_set_mib: int, rate_mib_per_s: float) -> DirtyStatus:
        """Sets the dirtier; another working set is verified whole before it is given up."""
        return DirtyStatus(**json.loads(await self.call(f"dirty {working_set_mib} {rate_mib_per_s:g}")))

    async def dirty_off(self) -> DirtyStatus:
        """Verifies all of the working set and gives it up."""
        return DirtyStatus(**json.loads(await self.call("dirty off")))

    async def journal_start(self, rate_mib_per_s: float, span_mib: int, device: str = "/dev/vda") -> JournalStatus:
        """Starts the journal; while it runs, sets its rate."""
        return JournalStatus(**json.loads(await self.call(f"journal start {rate_mib_per_s:g} {span_mib} {device}")))

    async def journal_stop(self) -> JournalStatus:
        """Stops the writer; its last status says what must be on the disk."""
        return JournalStatus(**json.loads(await self.call("journal stop")))

    async def journal_verify(self) -> JournalCheck:
        """Rereads the journal inside of the guest."""
        return JournalCheck(**json.loads(await self.call("journal verify")))

    async def ticks(self, reset: bool = False) -> Ticks:
        """The tick recorder; with `reset`, starts a new measurement."""
        return Ticks(**json.loads(await self.call("ticks reset" if reset else "ticks")))

    async def stalls(self) -> list[Stall]:
        """The last 64 since the tick recorder was reset."""
        return [Stall(*each) for each in json.loads(await self.call("stalls"))["stalls"]]
