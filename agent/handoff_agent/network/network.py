"""The tenants' networks on this host: what the leader told, what handoffs make of it, and which taps there are.

A guest whose port the leader has not told of is its tenant's by its own definition; until that is read, it may send
nothing.

Everything that changes this knowledge ends in the bridge. A change that makes a guest reachable, or keeps frames from
one that is paused, waits for the bridge and fails without it; one that takes something away is kept, and done when the
bridge is there again.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import structlog

from handoff_agent.network.bridge import Bridge, Flows
from handoff_agent.network.flow import Output
from handoff_agent.network.knowledge import Moves, Store, Told
from handoff_agent.network.newcomers import DOUBT_S, Definition, Newcomers, admitted
from handoff_agent.network.pipeline import NOBODYS_FRAME, Port, Tap, Tunnel, common_flows, mark, scout, tenant_flows
from handoff_agent.network.taps import Taps
from handoff_agent.network.treatment import HERE, Attachment, Key, Situation, treat
from handoff_agent.ovs_ports import GuestPort, OvsPorts
from handoff_agent.settings import NetworkSettings
from handoff_common.errors import DeadlineError, HandoffError, PreconditionError

log = structlog.get_logger()

TAPS_TIMEOUT_S: Final = 5.0
SETTLE_TIMEOUT_S: Final = 5.0
_COMMON: Final = 0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PortNow:
    """A port as it is treated now, for people."""

    attachment: Attachment
    interface: str
    ofport: int
    comes: bool
    leaves: bool
    goes_to: str


class Network:
    """Use it on the asyncio loop only; `run` it as a task."""

    def __init__(
        self, settings: NetworkSettings, database: str, ovs_ports: OvsPorts, store: Store, definition: Definition
    ) -> None:
        """`database`: Open vSwitch's, as ovs-vsctl names it."""
        self.settings = settings
        self.told = Told()
        self._store = store
        self._disk = ThreadPoolExecutor(1, "network")
        self._tenants: dict[int, dict[Key, Attachment]] = {}
        self._guests: dict[str, tuple[Attachment, ...]] = {}
        self._coming: dict[str, tuple[Attachment, ...]] = {}
        self._leaving: dict[str, str] = {}
        self._unsaved: set[Callable[[], Awaitable[None]]] = set()
        self.bridge = Bridge(settings.management_socket(), self)
        self._taps = Taps(settings, database, ovs_ports, self.bridge)
        self._newcomers = Newcomers(definition, self._on_definition)

    async def open(self) -> None:
        """Reads what was kept."""
        self.told, moves = await self._on_disk(self._store.load)
        self._coming, self._leaving = dict(moves.coming), dict(moves.leaving)
        self._taps.bind(moves.taps)
        self._index()

    async def run(self) -> None:
        """Keeps the bridge as it should be, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._newcomers.run(), name="newcomers")
            group.create_task(self.bridge.run(), name="bridge")

    async def close(self) -> None:
        """Takes no more; what was begun to be written is."""
        await asyncio.get_running_loop().run_in_executor(None, partial(self._disk.shutdown, wait=True))

    # What the leader tells.

    async def tell(self, told: Told) -> bool:
        """Keeps the leader's word, and tells whether the bridge has it. PreconditionError for what is not the newest.

        A guest that comes is here once the leader says so. A disk that takes nothing holds no frame up: what is not
        written is tried again at every look.
        """
        if (told.term, told.generation) < (self.told.term, self.told.generation):
            raise PreconditionError(
                f"generation {told.generation} of term {told.term} is over: generation {self.told.generation} of term"
                f" {self.told.term} has been told"
            )
        before, is_new = set(self._tenants), told != self.told
        self.told = told
        here = {each.domain_uuid for each in told.attachments if each.location == HERE}
        for uuid in here & set(self._coming):
            if not self._is_upgrade(uuid):
                del self._coming[uuid]
        self._index()
        if is_new:
            await self._keep(self._save_told)
        await self.look()
        applied = await self._put_if_there(before | set(self._tenants))
        for uuid in self._coming:
            self._explore_neighbours(uuid)
        return applied

    # What handoffs tell. Guests of which nobody told have no ports: nothing happens for them.

    async def expect(self, uuid: str, ports: Sequence[Attachment]) -> None:
        """A guest comes, and its taps are plugged: frames that its source sends on will wait in them.

        Each gets a frame that is nobody's first: of a guest that does not run yet, QEMU reads one frame, and loses it
        when the guest runs. Raises DeadlineError when they don't appear on the bridge, UnavailableError without a
        bridge, PreconditionError beside another guest that comes and whose group frames would be taken for its own.
        """
        if not ports:
            return
        self._can_be_told_apart(uuid, ports)
        self._coming[uuid] = tuple(ports)
        self._index()
        try:
            async with asyncio.timeout(TAPS_TIMEOUT_S):
                await self._wait_for_taps(uuid, ports)
        except TimeoutError:
            missing = ", ".join(each.key.mac for each in ports if self._taps.new(each.key) is None)
            raise DeadlineError(
                f"guest {ports[0].name}: its interface {missing} has not appeared on bridge {self.settings.bridge}"
                f" within {TAPS_TIMEOUT_S:g} s: {self.bridge.message or 'is it plugged in elsewhere?'}"
            ) from None
        await self.bridge.put({each.key.tunnel for each in ports})
        self._explore_neighbours(uuid)
        for each in ports:
            if (tap := self._taps.new(each.key)) is not None:
                self.bridge.send((Output(tap.ofport),), NOBODYS_FRAME)

    def explore(self, uuid: str, addresses: Iterable[str]) -> None:
        """Sends something nobody takes to these tunnel endpoints, so that the first frame of the guest that goes there
        does not wait for, or get lost in, the look for their MAC addresses.
        """
        tunnel_port = self.bridge.numbers.get(self.settings.tunnel_port)
        if tunnel_port is None:
            return
        for tunnel in self._tunnels_of(uuid):
            for address in sorted(set(addresses) - {HERE}):
                self.bridge.send(scout(tunnel, address, tunnel_port), NOBODYS_FRAME)

    def _explore_neighbours(self, uuid: str) -> None:
        tenants = (self._tenants.get(tunnel, {}) for tunnel in self._tunnels_of(uuid))
        self.explore(uuid, (each.location for ports in tenants for each in ports.values()))

    async def redirect(self, uuid: str, destination: str) -> None:
        """A guest is about to be paused here: from now on its frames go to the tunnel endpoint of its destination.

        `destination`: HERE when it only changes its slot. Raises as Bridge.put does.
        """
        is_new = self._leaving.get(uuid) != destination
        self._leaving[uuid] = destination
        began = time.monotonic()
        await self.bridge.put(self._tunnels_of(uuid))
        if is_new and self._tunnels_of(uuid):
            took_ms = round(1000 * (time.monotonic() - began), 1)
            log.info("frames go on", guest=uuid, to=destination or "its new tap", ms=took_ms)

    async def drain(self, uuid: str) -> None:
        """Waits for a moment until QEMU has read what its taps still held when its frames were sent on.

        What it has not read when the guest stops is lost.
        """
        ports = self._guests.get(uuid, ())
        drained = await asyncio.gather(*(self._taps.drain(each.key) for each in ports))
        for each, is_empty in zip(ports, drained, strict=True):
            if not is_empty:
                log.warning("frames may be lost: QEMU has not read them in time", guest=each.name, mac=each.key.mac)

    async def leave(self, uuid: str, destination: str) -> None:
        """It is paused; as `redirect`, and known to the agent's next life, too."""
        await self.redirect(uuid, destination)
        await self._keep(self._save_moves)

    async def stay(self, uuid: str) -> None:
        """It runs here again: its frames are its own again."""
        if self._leaving.pop(uuid, None) is not None:
            await self._settle(uuid)

    async def gone(self, uuid: str) -> None:
        """Its copy that was paused here is destroyed."""
        if self._is_upgrade(uuid):
            self._take_over(uuid)
        else:
            self._forget_coming(uuid)
        self._leaving.pop(uuid, None)
        await self._settle(uuid)

    async def settled(self, uuid: str) -> None:
        """A guest that came runs here, and stays. One from another host becomes ours by the leader's word."""
        if self._is_upgrade(uuid):
            self._take_over(uuid)
            await self._settle(uuid)

    async def not_coming(self, uuid: str) -> None:
        """A guest that was to come does not."""
        if uuid in self._coming:
            self._forget_coming(uuid)
            await self._settle(uuid)

    # What the bridge asks.

    async def look(self) -> None:
        """Finds the taps of the ports that are here, and closes new ones.

        What is there when the bridge is connected to is not cut off: it is learnt first whose it is.
        """
        is_first = not self.bridge.connected
        changed = await self._taps.find(self._all().values(), self._coming)
        new = self._newcomers.see(self._taps.plugged, are_new=not is_first)
        if is_first and new:
            await self._newcomers.settle(SETTLE_TIMEOUT_S)
            self._index()
            changed |= self._taps.match(self._all().values(), self._coming)
        elif new:
            await self._put_if_there({each.key.tunnel for port in new for each in self._attachments_of(port)})
        await self._taps.keep_from_site(
            [port.name for port in self._taps.plugged if self._is_closed_tenants(port)], self._newcomers.is_fresh
        )
        if changed:
            self._unsaved.add(self._save_moves)
        for save in tuple(self._unsaved):
            await self._keep(save)

    def wanted(self, tunnels: Iterable[int] | None = None) -> Flows:
        """The flows that the bridge should have, and those that all share in any case: a port that opens or closes
        does so at once.
        """
        tunnel_port = self.bridge.numbers.get(self.settings.tunnel_port)
        chosen = self._tenants if tunnels is None else {tunnel: self._tenants.get(tunnel, {}) for tunnel in tunnels}
        flows = {
            tunnel: tenant_flows([self._treat(each) for _, each in sorted(ports.items())], tunnel_port)
            for tunnel, ports in chosen.items()
        }
        flows[_COMMON] = common_flows(tunnel_port, self._closed())
        if tunnels is None:
            # Of tenants that have gone.
            return {**dict.fromkeys(self.bridge.tenants() - set(flows), frozenset()), **flows}
        return flows

    def are_urgent(self) -> bool:
        """A guest leaves or comes."""
        return bool(self._leaving or self._coming)

    async def only_these_leave(self, uuids: Collection[str]) -> None:
        """Only these guests leave: what was kept of others is of handoffs that somebody has removed by hand."""
        for uuid in set(self._leaving) - set(uuids):
            log.warning("a guest's frames are its own again: nothing is known of its handoff", guest=uuid)
            await self.stay(uuid)

    # What people ask.

    def ports(self) -> list[PortNow]:
        """All ports, by tenant and MAC."""
        return [self._describe(each) for key, each in sorted(self._all().items())]

    def _describe(self, attachment: Attachment) -> PortNow:
        port = self._treat(attachment)
        interface = self._taps.interface(attachment.key)
        by_number = {number: name for name, number in self.bridge.numbers.items()}
        return PortNow(
            attachment,
            interface,
            self.bridge.numbers.get(interface, 0),
            attachment.domain_uuid in self._coming,
            attachment.domain_uuid in self._leaving,
            _place_name(port, by_number),
        )

    # How it is known.

    def _all(self) -> dict[Key, Attachment]:
        return {key: each for ports in self._tenants.values() for key, each in ports.items()}

    def _index(self) -> None:
        self._tenants = {}
        guests: dict[str, list[Attachment]] = {}
        told = {each.key for each in self.told.attachments}
        untold = (each for ports in self._coming.values() for each in ports if each.key not in told)
        recorded = (*self.told.attachments, *untold)
        for each in (*recorded, *admitted(recorded, self._newcomers.claims())):
            self._tenants.setdefault(each.key.tunnel, {})[each.key] = each
            if each.domain_uuid:
                guests.setdefault(each.domain_uuid, []).append(each)
        self._guests = {uuid: tuple(ports) for uuid, ports in guests.items()}

    def _treat(self, attachment: Attachment) -> Port:
        situation = Situation(
            tap=self._taps.of(attachment.key),
            new_tap=self._taps.new(attachment.key),
            leaves_for=self._leaving.get(attachment.domain_uuid),
        )
        return treat(attachment, situation)

    def _closed(self) -> dict[int, int]:
        """Guests' ports that may send nothing, by number, and for how many seconds; 0: until that changes."""
        closed = {}
        for port in self._taps.plugged:
            if self._is_closed_tenants(port):
                closed[self.bridge.numbers.get(port.name, 0)] = 0
            elif not self._attachments_of(port) and self._newcomers.is_in_doubt(port.name):
                closed[self.bridge.numbers.get(port.name, 0)] = DOUBT_S
        closed.pop(0, None)
        return closed

    def _is_closed_tenants(self, port: GuestPort) -> bool:
        """It is a tenant's, but not to be used: now, or because another has its MAC or address."""
        number, attachments = self.bridge.numbers.get(port.name), self._attachments_of(port)
        if attachments:
            return not any(number in self._treat(each).senders for each in attachments)
        return self._newcomers.is_claimed(port.name)

    def _attachments_of(self, port: GuestPort) -> list[Attachment]:
        return [each for each in self._guests.get(port.domain_uuid, ()) if each.key.mac == port.mac]

    def _on_definition(self) -> None:
        self._index()
        self.bridge.look_again()

    def _tunnels_of(self, uuid: str) -> set[int]:
        return {each.key.tunnel for each in self._guests.get(uuid, ())}

    def _is_upgrade(self, uuid: str) -> bool:
        """A guest that comes, and has a tap here already."""
        return uuid in self._coming and any(self._taps.knows(each.key) for each in self._coming[uuid])

    def _take_over(self, uuid: str) -> None:
        """The new taps are the guest's taps."""
        for each in self._coming.pop(uuid, ()):
            self._taps.take_over(each.key)

    def _forget_coming(self, uuid: str) -> None:
        for each in self._coming.pop(uuid, ()):
            self._taps.forget_new(each.key)

    def _can_be_told_apart(self, uuid: str, ports: Sequence[Attachment]) -> None:
        others = [each for other, coming in self._coming.items() if other != uuid for each in coming]
        marks = {(each.key.tunnel, mark(each.key.mac)): each for each in others}
        for each in ports:
            if (other := marks.get((each.key.tunnel, mark(each.key.mac)))) is not None:
                raise PreconditionError(
                    f"guest {each.name} can't come while {other.name} does: group frames for {each.key.mac} and"
                    f" {other.key.mac} would be taken for each other. Move it when {other.name} is here"
                )

    async def _wait_for_taps(self, uuid: str, ports: Sequence[Attachment]) -> None:
        with self.bridge.port_changes() as changed:
            while True:
                changed.clear()
                await self.look()
                if all(self._taps.new(each.key) is not None for each in ports):
                    break
                await changed.wait()
        await self._keep(self._save_moves)
        await self._on_disk(partial(self._taps.lengthen_queues, [each.key for each in ports]))

    async def _settle(self, uuid: str) -> None:
        tunnels = self._tunnels_of(uuid)
        self._index()
        await self._put_if_there(tunnels)
        await self._keep(self._save_moves)
        self.bridge.look_again()

    async def _put_if_there(self, tunnels: Iterable[int]) -> bool:
        try:
            await self.bridge.put(tunnels)
        except HandoffError as error:
            log.warning("the bridge is put right when it is there", error=error.message)
            self.bridge.look_again()
            return False
        return True

    async def _on_disk(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work)

    async def _save_moves(self) -> None:
        moves = Moves(dict(self._coming), dict(self._leaving), self._taps.bound())
        await self._on_disk(partial(self._store.save_moves, moves))

    async def _save_told(self) -> None:
        await self._on_disk(partial(self._store.save_told, self.told))

    async def _keep(self, save: Callable[[], Awaitable[None]]) -> None:
        """Writes what is true already. What the disk does not take now is tried again at the next looks."""
        self._unsaved.discard(save)
        try:
            with contextlib.suppress(RuntimeError):  # the agent ends
                await save()
        except OSError as error:
            self._unsaved.add(save)
            log.warning("an agent that is restarted now does not know all of the network", error=str(error))


def _place_name(port: Port, interfaces: Mapping[int, str]) -> str:
    match port.place:
        case Tap(ofport=number):
            return interfaces.get(number, str(number))
        case Tunnel(address=address):
            return address
        case None:
            return "-"
