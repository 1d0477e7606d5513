"""One leader among the controller's replicas, and a term that fences off the ones before it.

Each candidate puts a key of its own below the prefix, under its own lease. The one with the lowest create-revision
leads; that revision is its term, which grows from leader to leader.

    candidate                         etcd                          candidate
    lease, put leader/<lease> ──────▶ created at 17
    lowest: leads with term 17        created at 21  ◀────────────── put leader/<lease>
    each write: if leader/<lease>                                    waits
      was created at 17 ────────────▶ applied
    (frozen)                          lease expires ───────────────▶ lowest: leads with term 21
    (revived) write if … 17 ────────▶ refused

A leader stops by itself at its lease's local deadline. Should it be late, its writes are refused by etcd, since its
key is gone, and its calls by the agents, which know of a higher term.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass

import structlog

from handoff_common.errors import DeadlineError, HandoffError, NotFoundError, StaleTermError, UnavailableError
from handoff_controller.etcd.client import EtcdClient, backoff_s
from handoff_controller.etcd.lease import MIN_TTL_S, Lease
from handoff_controller.etcd.txn import Compare, KeyValue, created_at, missing, put, read
from handoff_controller.etcd.watch import follow

log = structlog.get_logger()

LEADER_PREFIX = "/handoff/v1/leader/"


@dataclass(frozen=True, slots=True)
class Leader:
    """Who leads: a replica's name, the address on which the others reach it, and its term."""

    name: str
    address: str
    term: int


class Leadership:
    """The right to lead for one term, as handed to the leader's work."""

    def __init__(self, lease: Lease, key: str, term: int) -> None:
        self.key = key
        self.term = term
        self.lost = lease.lost
        self._lease = lease

    @property
    def lease_id(self) -> int:
        """The lease that leadership hangs on; a key under it goes when the leader does."""
        return self._lease.id

    def valid(self) -> bool:
        """Whether we still lead, as far as this host's clock can tell; False once and for all after the deadline."""
        return self._lease.valid()

    def check(self) -> None:
        """Call it before anything that only the leader may do. Raises StaleTermError when we don't lead any more."""
        if not self.valid():
            raise StaleTermError(f"term {self.term} has ended; another replica may lead: ask the present leader")

    def guard(self) -> Compare:
        """The compare that each write must include. Raises StaleTermError as `check` does."""
        self.check()
        return created_at(self.key, self.term)


Work = Callable[[Leadership], Coroutine[object, object, None]]
Views = AsyncGenerator[dict[str, KeyValue], None]


class Election:
    """Campaigns as `name`, reachable at `address`, and runs the leader's work for as long as we lead."""

    def __init__(
        self,
        client: EtcdClient,
        name: str,
        address: str,
        *,
        prefix: str = LEADER_PREFIX,
        lease_ttl_s: int = MIN_TTL_S,
    ) -> None:
        self._client = client
        self._prefix = prefix
        self._lease_ttl_s = lease_ttl_s
        self._value = json.dumps({"name": name, "address": address}).encode()
        self._log = log.bind(candidate=name)

    async def run(self, lead: Work) -> None:
        """Campaigns, runs `lead`, and campaigns again when leadership was lost, until `lead` returns.

        `lead` is cancelled, and awaited, when the lease's local deadline passes or our key is deleted. What it raises
        ends `run`, except StaleTermError, and any HandoffError after leadership was lost. However it ends, we resign,
        and the next candidate leads at once.
        """
        attempt = 0
        while True:
            async with AsyncExitStack() as stack:
                try:
                    leadership, views = await self._campaign(stack)
                except (UnavailableError, DeadlineError, NotFoundError, StaleTermError) as error:
                    self._log.warning("campaign failed, trying again", error=error.message)
                else:
                    attempt = 0
                    if await self._lead(leadership, views, lead):
                        return
            await asyncio.sleep(backoff_s(attempt))
            attempt += 1

    async def _campaign(self, stack: AsyncExitStack) -> tuple[Leadership, Views]:
        """Waits until we lead; `stack` holds what is to be undone afterwards.

        Returns the leadership and the views of the candidates from then on. Raises StaleTermError when the lease or
        our key was lost before.
        """
        lease = await stack.enter_async_context(Lease(self._client, self._lease_ttl_s))
        key = f"{self._prefix}{lease.id:016x}"
        entered = await self._client.txn(
            [missing(key)], [put(key, self._value, lease.id), read(key)], [read(key)], deadline_s=self._lease_ttl_s / 2
        )
        (ours,) = entered.reads
        if ours is None:
            raise StaleTermError(f"{key} was deleted while we entered the election")
        leadership = Leadership(lease, key, ours.create_revision)
        self._log.info("campaigning", term=leadership.term)
        views = await stack.enter_async_context(aclosing(follow(self._client, self._prefix)))
        await _until_first(_until_elected(views, leadership), leadership.lost.wait())
        leadership.check()
        return leadership, views

    async def _lead(self, leadership: Leadership, views: Views, lead: Work) -> bool:
        """Runs the leader's work; returns whether it came to its own end, False when leadership was lost."""
        self._log.info("leading", term=leadership.term)
        try:
            ended = await _until_first(lead(leadership), _until_gone(views, leadership), leadership.lost.wait())
        except StaleTermError:
            ended = False
        except HandoffError as error:
            if leadership.valid():
                raise
            self._log.warning("the leader's work failed as leadership was lost", error=error.message)
            ended = False
        self._log.info("resigning" if ended else "leadership lost", term=leadership.term)
        return ended


async def current_leader(client: EtcdClient, prefix: str = LEADER_PREFIX) -> Leader | None:
    """Reads who leads now; None between two leaders. Raises UnavailableError or DeadlineError as the client does."""
    _, candidates = await client.list(prefix)
    return leader_of(candidates)


async def watch_leader(client: EtcdClient, prefix: str = LEADER_PREFIX) -> AsyncGenerator[Leader | None, None]:
    """Yields who leads, now and at each change; use it within `contextlib.aclosing`."""
    last: Leader | None = None
    first = True
    async with aclosing(follow(client, prefix)) as views:
        async for view in views:
            leader = leader_of(view.values())
            if first or leader != last:
                yield leader
            first, last = False, leader


def leader_of(candidates: Iterable[KeyValue]) -> Leader | None:
    """The candidate that was there first."""
    leading = min(candidates, key=lambda candidate: candidate.create_revision, default=None)
    if leading is None:
        return None
    who: dict[str, str] = json.loads(leading.value)
    return Leader(who["name"], who["address"], leading.create_revision)


async def _until_elected(views: Views, leadership: Leadership) -> None:
    """Raises StaleTermError when our key is deleted before our turn."""
    async for view in views:
        if not _is_candidate(view, leadership):
            raise StaleTermError(f"{leadership.key} was deleted before it was elected")
        if min(candidate.create_revision for candidate in view.values()) == leadership.term:
            return


async def _until_gone(views: Views, leadership: Leadership) -> None:
    async for view in views:
        if not _is_candidate(view, leadership):
            return


def _is_candidate(view: Mapping[str, KeyValue], leadership: Leadership) -> bool:
    ours = view.get(leadership.key)
    return ours is not None and ours.create_revision == leadership.term


async def _until_first(first: Coroutine[object, object, object], *others: Coroutine[object, object, object]) -> bool:
    """Runs all until one ends, then cancels and awaits the rest. Returns whether `first` was among those that ended.

    Raises what the ended ones raised.
    """
    tasks = [asyncio.create_task(coroutine) for coroutine in (first, *others)]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in set(tasks) - ended:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("failed while it was cancelled", error=str(error), exc_info=error)
    for task in ended:
        task.result()
    return tasks[0] in ended
