"""Keeps the records of hosts and guests true: the leader looks at every agent, at each event and every few seconds."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from datetime import UTC, datetime

import structlog

from handoff.agent.v1.types_pb2 import Domain
from handoff.controller.v1.guests_pb2 import Guest
from handoff.controller.v1.hosts_pb2 import Host, HostState
from handoff_common.errors import ConflictError, DeadlineError, HandoffError, UnavailableError
from handoff_controller.agents import Agents, GrpcAgent
from handoff_controller.reconcile import ACTIVE, reconcile
from handoff_controller.settle import Settler
from handoff_controller.store import Store

log = structlog.get_logger()

LOOK_EVERY_S = 3.0
# Events come in bursts (defined, started, resumed): one look serves them all.
SETTLE_EVENTS_S = 0.1
# A host's record is written when something changed, or when its seen_time is this old.
REFRESH_RECORD_S = 15.0


class Fleet:
    """The hosts as the leader sees them."""

    def __init__(self, agents: Agents, store: Store, settler: Settler, changed: Callable[[], None]) -> None:
        """`changed` is called whenever a host or a guest is not what it was."""
        self._agents = agents
        self._store = store
        self._settler = settler
        self._changed = changed
        self._hosts: dict[str, Host] = {}
        self._reported: dict[str, set[str]] = {}
        self._problems: dict[str, list[str]] = {}

    async def run(self) -> None:
        """Looks at every host, for ever. Raises StaleTermError when we don't lead any more."""
        async with asyncio.TaskGroup() as group:
            for name in self._agents.names():
                group.create_task(self._follow(self._agents[name]), name=f"look at {name}")

    async def look(self, name: str) -> Host:
        """Looks at one host now and brings the records up to date."""
        agent = self._agents[name]
        host = Host(name=name, agent_address=agent.address)
        domains: tuple[Domain, ...] | None = None
        # Read before the domains: a guest that has moved since then is not the one that its compare expects.
        guests = await self._store.guests()
        try:
            host.detail.CopyFrom(await agent.get_host())
            domains = await agent.list_domains()
        except HandoffError as error:
            await self._describe_absent(host, error)
        else:
            host.seen_time.FromDatetime(datetime.now(UTC))
            lost = [slot.name for slot in host.detail.slots if not slot.connected]
            host.state = HostState.HOST_STATE_DEGRADED if lost else HostState.HOST_STATE_UP
            if lost:
                host.message = f"libvirt of slot {', '.join(lost)} does not answer"
            host.domains.extend(domains)
            host.guests = sum(domain.state in ACTIVE and not domain.migration_id for domain in domains)
            host.problems.extend(self._problems.get(name, ()))
        await self._record(host)
        if domains is not None and host.state == HostState.HOST_STATE_UP:
            await self._reconcile(name, domains, guests)
            self._problems[name] = await self._settler.settle(agent)
            if self._problems[name] != list(host.problems):
                host.problems[:] = self._problems[name]
                await self._record(host)
        else:
            self._reported.pop(name, None)
            self._settler.forget(name)
        return host

    async def _describe_absent(self, host: Host, error: HandoffError) -> None:
        """An agent that is away says nothing of its guests: what it told last stays in the record."""
        last = self._hosts.get(host.name)
        if last is None:  # what it told another leader
            last = next((one for one in await self._store.hosts() if one.name == host.name), None)
        if last is not None:
            address = host.agent_address
            host.CopyFrom(last)
            host.agent_address = address
        host.state = HostState.HOST_STATE_DOWN
        host.message = error.message

    async def _follow(self, agent: GrpcAgent) -> None:
        changed = asyncio.Event()
        listener = asyncio.create_task(self._listen(agent, changed))
        try:
            while True:
                changed.clear()
                try:
                    await self.look(agent.name)
                except (ConflictError, UnavailableError, DeadlineError) as error:
                    log.warning("a look at a host was not recorded", host=agent.name, error=error.message)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_EVERY_S):
                        await changed.wait()
                    await asyncio.sleep(SETTLE_EVENTS_S)
        finally:
            listener.cancel()
            await asyncio.wait({listener})

    @staticmethod
    async def _listen(agent: GrpcAgent, changed: asyncio.Event) -> None:
        while True:
            try:
                async with aclosing(agent.watch_events()) as events:
                    async for _ in events:
                        changed.set()
            except HandoffError as error:
                log.debug("no events from a host", host=agent.name, error=error.message)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _record(self, host: Host) -> None:
        last = self._hosts.get(host.name)
        if last is None or last.state != host.state:
            log.info("host", host=host.name, state=HostState.Name(host.state), message=host.message)
        if last is not None and _same(last, host):
            return
        await self._store.put_host(host)
        self._hosts[host.name] = host
        self._changed()

    async def _reconcile(self, name: str, domains: tuple[Domain, ...], guests: tuple[Guest, ...]) -> None:
        self._reported[name] = {domain.uuid for domain in domains}
        changes = reconcile(name, domains, guests, self._reported)
        for guest in changes.written:
            await self._write(self._store.put_guest, guest, "guest")
        for guest in changes.forgotten:
            await self._write(self._store.delete_guest, guest, "guest gone")
        if changes.written or changes.forgotten:
            self._changed()

    @staticmethod
    async def _write(write: Callable[[Guest], Awaitable[None]], guest: Guest, event: str) -> None:
        try:
            await write(guest)
        except ConflictError:
            # Another look, or a migration, was faster: it saw what is newer, or the next look will.
            log.debug("guest changed meanwhile", guest=guest.name)
        else:
            log.info(event, guest=guest.name, owner=guest.owner.host, conflicts=list(guest.conflicts))


def _same(last: Host, now: Host) -> bool:
    """Whether nothing changed that is worth a write."""
    if abs(now.seen_time.ToMilliseconds() - last.seen_time.ToMilliseconds()) > 1000 * REFRESH_RECORD_S:
        return False
    copy = Host()
    copy.CopyFrom(now)
    copy.seen_time.CopyFrom(last.seen_time)
    return copy == last
