"""Keeps our flows in one bridge: connects again when the switch was restarted, and puts right what is missing.

Flows are known by their cookies, which are digests of them: one that somebody has changed is not what its cookie says.
"""

import asyncio
import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol, TypeAlias

import structlog

from handoff_agent.network.connection import OpenFlowConnection
from handoff_agent.network.flow import Flow, Output, SetField
from handoff_agent.network.openflow import PortDescription, SeenFlow, cookie
from handoff_common.errors import HandoffError, PreconditionError, UnavailableError

log = structlog.get_logger()

RECONNECT_S: Final = 0.1
FIRST_TRY_S: Final = 2.0
"""How long what is asked of a bridge at the agent's start waits for the first connection to it."""
CHECK_EVERY_S: Final = 10.0
CHECK_AT_LEAST_EVERY_S: Final = 60.0
"""Also while guests leave or come."""

Flows: TypeAlias = Mapping[int, frozenset[Flow]]
"""By tenant; 0 for what all of them share."""


class Wishes(Protocol):
    """Says what the bridge shall have."""

    async def look(self) -> None:
        """The bridge's ports have changed, or it is time to look again."""

    def wanted(self, tunnels: Iterable[int] | None = None) -> Flows:
        """The flows of these tenants, of all without an argument, and what they share."""

    def are_urgent(self) -> bool:
        """A guest leaves or comes: what can wait should not be in its way."""


class Bridge:
    """Our flows in a bridge. `run` it as a task."""

    def __init__(self, path: Path, wishes: Wishes) -> None:
        """`path`: the bridge's management socket."""
        self.numbers: dict[str, int] = {}
        """OpenFlow numbers of its ports, by name."""
        self.connections = 0
        """How often it was connected to."""
        self.message = "not connected yet"
        """Why it has not the flows that it should have; empty when it has them."""
        self._path = path
        self._wishes = wishes
        self._connection: OpenFlowConnection | None = None
        self._tried = asyncio.Event()
        self._changed = asyncio.Event()
        self._ports_changed: set[asyncio.Event] = set()
        self._installed: dict[int, frozenset[Flow]] = {}
        self._uncertain = False
        self._compared_at = 0.0
        self._due_at = 0.0
        self._remade: frozenset[int] = frozenset()
        self._tolerated: frozenset[int] = frozenset()
        self._lock = asyncio.Lock()

    @property
    def connected(self) -> bool:
        """There is a connection, and the flows have been compared."""
        return self._connection is not None

    @property
    def flows(self) -> int:
        """How many flows of ours the bridge has."""
        return sum(map(len, self._installed.values()))

    def tenants(self) -> set[int]:
        """Whose flows it has."""
        return set(self._installed)

    @contextlib.contextmanager
    def port_changes(self) -> Iterator[asyncio.Event]:
        """An event that is set whenever a port comes, changes or goes."""
        event = asyncio.Event()
        self._ports_changed.add(event)
        try:
            yield event
        finally:
            self._ports_changed.discard(event)

    async def run(self) -> None:
        """Keeps the bridge as it is wished, for ever."""
        while True:
            try:
                await self._serve()
            except HandoffError as error:
                self._note(error.message)
            except Exception as error:  # noqa: BLE001 - tenants must not be left to themselves by a bug
                self._note(f"{type(error).__name__}: {error}; this is a bug in the agent")
            self._tried.set()
            await asyncio.sleep(RECONNECT_S)

    async def put(self, tunnels: Iterable[int]) -> None:
        """Brings these tenants' flows to what is wished, at once for every packet.

        Raises UnavailableError without a connection, and as OpenFlowConnection.apply does. The first connection is
        waited for: a guest that an earlier life of the agent has paused must not be turned back for want of it.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_TRY_S):
                await self._tried.wait()
        async with self._lock:
            if self._connection is None:
                raise UnavailableError(f"no connection to the bridge at {self._path}: {self.message}")
            if self._uncertain:
                await self._compare(self._connection)
            else:
                await self._put(self._connection, self._wishes.wanted(tunnels))

    def send(self, actions: Sequence[SetField | Output], frame: bytes) -> None:
        """Sends a frame of our own, if there is a connection."""
        if self._connection is not None:
            self._connection.send(actions, frame)

    async def _put(self, connection: OpenFlowConnection, wanted: Flows) -> None:
        before = _all(self._installed.get(tunnel, frozenset()) for tunnel in wanted)
        after = _all(wanted.values())
        added, removed = after - before, before - after
        if added or removed:
            await self._apply(connection, tuple(added), [cookie(flow) for flow in removed])
        self._installed.update(wanted)

    async def _apply(
        self,
        connection: OpenFlowConnection,
        added: Sequence[Flow],
        removed: Sequence[int],
        removed_first: Sequence[int] = (),
    ) -> None:
        """Of an attempt whose end was not seen nobody knows what it did: the switch is asked before the next."""
        self._uncertain = True
        try:
            await connection.apply(added, removed, removed_first)
        except PreconditionError:
            self._uncertain = False
            raise
        self._uncertain = False

    async def _serve(self) -> None:
        connection = await OpenFlowConnection.open(self._path, self._on_port)
        reading = asyncio.create_task(connection.run(), name="openflow")
        try:
            self.numbers = {port.name: port.number for port in await connection.ports()}
            self.connections += 1
            await self._wishes.look()
            self._remade = self._tolerated = frozenset()
            async with self._lock:
                await self._compare(connection)
                self._connection = connection
            self._tried.set()
            log.info("bridge connected", bridge=str(self._path), flows=self.flows)
            while not reading.done():
                await self._follow(connection, reading)
            raise UnavailableError(f"the connection to the bridge at {self._path} was lost")
        finally:
            self._connection = None
            reading.cancel()
            await asyncio.wait({reading})

    async def _follow(self, connection: OpenFlowConnection, reading: asyncio.Task[None]) -> None:
        """Waits for a change, or until it is time to compare, and does what follows."""
        changed = asyncio.create_task(self._changed.wait())
        try:
            due_s = max(0.0, self._due_at - asyncio.get_running_loop().time())
            await asyncio.wait({changed, reading}, timeout=due_s, return_when=asyncio.FIRST_COMPLETED)
            is_change = changed.done()
        finally:
            changed.cancel()
        if reading.done():
            return
        self._changed.clear()
        await self._wishes.look()
        async with self._lock:
            try:
                if is_change and not self._uncertain:
                    await self._put(connection, self._wishes.wanted())
                if self._uncertain or self._is_due():
                    await self._compare(connection)
                self.message = ""
            except PreconditionError as error:
                self._note(error.message)

    def _is_due(self) -> bool:
        """It is time to compare; put off while guests leave or come."""
        now = asyncio.get_running_loop().time()
        if now < self._due_at:
            return False
        self._due_at = now + CHECK_EVERY_S
        return not self._wishes.are_urgent() or now - self._compared_at >= CHECK_AT_LEAST_EVERY_S

    async def _compare(self, connection: OpenFlowConnection) -> None:
        """Asks the bridge for what it has, and puts right what differs."""
        self._compared_at = asyncio.get_running_loop().time()
        self._due_at = self._compared_at + CHECK_EVERY_S
        there = await connection.flows()
        wanted = self._wishes.wanted()
        self._tolerate(there, _all(wanted.values()))
        missing, surplus, changed = differences(there, _all(wanted.values()), self._tolerated)
        if missing or surplus or changed:
            log.info("flows put right", missing=len(missing), surplus=len(surplus), changed=len(changed))
            await self._apply(connection, missing, surplus, changed)
        self._remade = frozenset(changed)
        self._installed = dict(wanted)
        self._uncertain = False
        self.message = ""

    def _tolerate(self, there: Collection[SeenFlow], wanted: Iterable[Flow]) -> None:
        """Takes as they are those that the last compare has made again in vain: each time costs frames."""
        remade, self._remade = self._remade, frozenset()
        again = remade.intersection(differences(there, wanted)[2])
        if again:
            log.warning(
                "flows that were made again are changed again, and left as they are: somebody keeps changing them,"
                " or this version of Open vSwitch tells them in another way. See `ovs-ofctl dump-flows`; those that are"
                " deleted are made again",
                bridge=str(self._path),
                flows=len(again),
                cookies=[f"{number:#x}" for number in sorted(again)[:5]],
            )
        not_as_made = {seen.cookie for seen in there if not seen.is_as_made}
        self._tolerated = (self._tolerated & not_as_made) | again

    def _on_port(self, present: bool, port: PortDescription) -> None:
        if present:
            self.numbers[port.name] = port.number
        else:
            self.numbers.pop(port.name, None)
        self.look_again()
        for event in self._ports_changed:
            event.set()

    def look_again(self) -> None:
        """Makes `run` look, and put right what has changed."""
        self._changed.set()

    def _note(self, message: str) -> None:
        if message != self.message:
            self.message = message
            log.warning("bridge", bridge=str(self._path), error=message)


def differences(
    there: Collection[SeenFlow], wanted: Iterable[Flow], tolerated: Collection[int] = ()
) -> tuple[list[Flow], list[int], list[int]]:
    """Which flows to add, and the cookies of those to delete, and to delete before others are added. Pure.

    One that somebody has changed keeps its cookie: it is deleted by that and added again. What is not wanted goes last,
    whatever it is: no frame is lost where one of another cookie takes its place.
    `tolerated`: cookies of flows that are taken as they are.
    """
    flows = {cookie(flow): flow for flow in wanted}
    seen = {each.cookie for each in there}
    changed = {each.cookie for each in there if not each.is_as_made}.difference(tolerated)
    missing = [flow for number, flow in flows.items() if number not in seen or number in changed]
    return missing, list(seen - flows.keys()), list(changed & flows.keys())


def _all(parts: Iterable[frozenset[Flow]]) -> frozenset[Flow]:
    nothing: frozenset[Flow] = frozenset()
    return nothing.union(*parts)
