"""The network in virtual time: messages that are lost, late or repeated, hosts and an etcd that are cut off.

Messages are counted: the orders to agents and to the storage, the openings of watches and the writes of migrations.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Protocol, TypeVar

from plans import Kind, Trouble

from handoff_common.errors import DeadlineError, UnavailableError
from handoff_controller.etcd.txn import TxnResult
from handoff_controller.store import MIGRATIONS

Answer = TypeVar("Answer")

LATENCY_S = 0.002
TIMEOUT_S = 8.0
LONGEST_RETRY_S = 4.0


class Happenings(Protocol):
    """The world around it."""

    def spawn(self, coroutine: Coroutine[object, object, Answer]) -> asyncio.Task[Answer]:
        """A task that the world ends with."""

    def happen(self, trouble: Trouble) -> None:
        """What a plan has for this message, beside its way."""

    def write(self, effect: Callable[[], TxnResult]) -> TxnResult:
        """A transaction arrives at etcd."""


class Network:
    """Carries every message, with what the plan says."""

    def __init__(self, happenings: Happenings, troubles: Sequence[Trouble]) -> None:
        self.sent = 0
        self._world = happenings
        self._troubles = {trouble.at: trouble for trouble in troubles}
        self._cut: dict[str, float] = {}

    def cut(self, what: str, for_s: float) -> None:
        self._cut[what] = asyncio.get_running_loop().time() + for_s

    def is_cut(self, what: str) -> bool:
        return asyncio.get_running_loop().time() < self._cut.get(what, 0.0)

    async def read(self, effect: Callable[[], object]) -> None:
        await asyncio.sleep(LATENCY_S)
        if self.is_cut("etcd"):
            raise UnavailableError("etcd is cut off")
        effect()

    async def write(self, keys: Sequence[str], effect: Callable[[bool], TxnResult]) -> TxnResult:
        trouble = self._next() if any(key.startswith(MIGRATIONS) for key in keys) else None

        async def apply() -> TxnResult:
            result = self._world.write(lambda: effect(False))
            if trouble is not None and trouble.kind is Kind.REPEATED:
                await asyncio.sleep(min(trouble.delay_s, LONGEST_RETRY_S))
                return self._world.write(lambda: effect(True))
            return result

        return await self._carry("etcd", trouble, apply, repeats=False)

    async def order(self, host: str, handle: Callable[[], Awaitable[Answer]]) -> Answer:
        return await self._carry(host, self._next(), handle, repeats=True)

    async def open(self, host: str) -> None:
        """Opens a watch."""
        trouble = self._next()
        await asyncio.sleep(LATENCY_S)
        if self.is_cut(host) or (trouble is not None and trouble.kind in (Kind.LOST, Kind.VANISHED, Kind.LATE)):
            raise UnavailableError(f"{host} is cut off")

    async def ask(self, host: str) -> None:
        """A question without effect."""
        await asyncio.sleep(LATENCY_S)
        if self.is_cut(host):
            raise UnavailableError(f"{host} is cut off")

    def _next(self) -> Trouble | None:
        trouble = self._troubles.pop(self.sent, None)
        self.sent += 1
        if trouble is not None:
            self._world.happen(trouble)
        return trouble

    async def _carry(
        self, to: str, trouble: Trouble | None, handle: Callable[[], Awaitable[Answer]], *, repeats: bool
    ) -> Answer:
        kind = trouble.kind if trouble is not None else None
        delay_s = trouble.delay_s if trouble is not None else 0.0
        if kind is Kind.LOST or self.is_cut(to):
            await asyncio.sleep(LATENCY_S)
            raise UnavailableError(f"{to} can't be reached")
        if kind is Kind.VANISHED:
            await asyncio.sleep(TIMEOUT_S)
            raise DeadlineError(f"{to} does not answer")
        arrival_s = TIMEOUT_S + delay_s if kind is Kind.LATE else LATENCY_S
        # What has been sent arrives, also when its sender gives up or dies.
        arrived = self._world.spawn(_arrive(arrival_s, handle))
        if kind is Kind.REPEATED and repeats:
            self._world.spawn(_arrive(arrival_s + delay_s, handle))
        if kind in (Kind.ANSWER_LOST, Kind.LATE):
            await asyncio.sleep(TIMEOUT_S)
            raise DeadlineError(f"{to} does not answer")
        try:
            answer = await asyncio.wait_for(asyncio.shield(arrived), TIMEOUT_S)
        except TimeoutError:
            raise DeadlineError(f"{to} does not answer") from None
        await asyncio.sleep(LATENCY_S)
        if self.is_cut(to):
            raise UnavailableError(f"the answer of {to} was lost")
        return answer


async def _arrive(after_s: float, handle: Callable[[], Awaitable[Answer]]) -> Answer:
    await asyncio.sleep(after_s)
    return await handle()
