"""Keeps what the mirrors of one guest send, all together, within a rate: mechanism, by flows.py and shares.py."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Final, TypeVar

from handoff_agent.descriptors import Descriptor
from handoff_agent.disks import flows
from handoff_agent.disks.shares import Use, catching_up, credit_bytes, even_shares, shares
from handoff_agent.disks.uris import ExportUri

# Between looks at who needs how much.
TICK_S: Final = 0.1
# What is on its way holds up whoever waits for the disk to be idle: QEMU as a whole when the guest is paused or reset.
IN_FLIGHT_S: Final = 0.2
# QEMU copies by so much at once; a copy that begins elsewhere takes zeros along with data.
LEAST_IN_FLIGHT_BYTES: Final = 1 << 20
MOST_IN_FLIGHT_BYTES: Final = 16 << 20

T = TypeVar("T")


def in_flight_bytes(rate_bytes_per_s: int, disks: int) -> int:
    """How much of one disk may be on its way when its connection is paced; 0: the rate is too low for that."""
    fits = int(rate_bytes_per_s * IN_FLIGHT_S) // disks
    return min(fits - fits % LEAST_IN_FLIGHT_BYTES, MOST_IN_FLIGHT_BYTES)


class Pacing:
    """The pace of one handoff's mirrors. Connections keep it without an agent; `was_ended` tells what the last left."""

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._flows: Sequence[Descriptor] = ()
        self._shares: list[int] = []
        self._sent: list[int] = []
        self._looked_s = 0.0
        self._credit = 0.0
        self._rate = 0

    @property
    def on(self) -> bool:
        """The mirrors' connections keep to the rate."""
        return self._rate > 0

    async def was_ended(self, exports: Sequence[ExportUri]) -> bool:
        """Whether the last agent let mirrors send as fast as they can; for mirrors that it began. Raises OSError."""
        rates = await self._blocking(lambda: [flows.allowed_bytes_per_s(flow) for flow in _find(exports)])
        return 0 in rates

    async def begin(self, exports: Sequence[ExportUri], rate_bytes_per_s: int) -> None:
        """Paces the mirrors into `exports`, which are connected. Raises OSError when that can't be done."""
        found = await self._blocking(lambda: _find(exports))
        if len(found) != len(exports):
            raise OSError(f"{len(found)} connections are found instead of {len(exports)}")
        even = even_shares(rate_bytes_per_s, len(found))
        self._sent = await self._blocking(lambda: _bound_all(found, even))
        self._flows, self._shares, self._rate, self._looked_s = found, even, rate_bytes_per_s, time.monotonic()

    async def wait(self, wait_s: float) -> None:
        """Waits, and sees meanwhile to it that the rate is used. Raises OSError when a connection is gone."""
        until_s = time.monotonic() + wait_s
        while (left_s := until_s - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, TICK_S))
            if self.on and time.monotonic() - self._looked_s >= TICK_S / 2:
                await self._share_out()

    async def settle(self) -> None:
        """Even shares, for a time without looks. Raises OSError when a connection is gone."""
        if self.on:
            self._shares = even_shares(self._rate, len(self._flows))
            self._sent = await self._blocking(lambda: _bound_all(self._flows, self._shares))

    async def end(self, exports: Sequence[ExportUri]) -> None:
        """Lets them send as fast as they can, also those that another agent paced. Raises OSError."""
        found = self._flows or await self._blocking(lambda: _find(exports))
        self._rate, self._flows = 0, ()
        await self._blocking(lambda: _bound_all(found, [0] * len(found)))

    async def _share_out(self) -> None:
        sent = await self._blocking(lambda: [flows.sent_bytes(flow) for flow in self._flows])
        now_s = time.monotonic()
        elapsed_s = now_s - self._looked_s
        uses = [
            Use(share, (after - before) / elapsed_s)
            for share, before, after in zip(self._shares, self._sent, sent, strict=True)
        ]
        self._credit = credit_bytes(self._rate, self._credit, sum(sent) - sum(self._sent), elapsed_s)
        self._sent, self._looked_s = sent, now_s
        new = shares(catching_up(self._rate, self._credit, TICK_S), uses)
        if new != self._shares:
            await self._blocking(lambda: _bound_all(self._flows, new))
            self._shares = new

    async def _blocking(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _find(exports: Sequence[ExportUri]) -> Sequence[Descriptor]:
    try:
        return [flow for host, port in {(each.host, each.port) for each in exports} for flow in flows.find(host, port)]
    except ValueError as error:
        raise OSError(str(error)) from error


def _bound_all(found: Sequence[Descriptor], rates: Sequence[int]) -> list[int]:
    """Those that go down first. Returns what each has sent."""
    for flow, rate in sorted(zip(found, rates, strict=True), key=lambda pair: pair[1]):
        flows.bound(flow, rate)
    return [flows.sent_bytes(flow) for flow in found]
