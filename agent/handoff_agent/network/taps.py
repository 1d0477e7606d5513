"""Which interfaces on the bridge are the tenants' ports, and what is done to each of them once."""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final

import structlog

from handoff_agent.network import plumbing
from handoff_agent.network.bridge import Bridge
from handoff_agent.network.flow import Output
from handoff_agent.network.pipeline import NOBODYS_FRAME, Tap
from handoff_agent.network.treatment import Attachment, Key, names
from handoff_agent.ovs_ports import GuestPort, OvsPorts
from handoff_agent.settings import NetworkSettings
from handoff_common.errors import HandoffError

log = structlog.get_logger()

# QEMU reads within a millisecond or two, much later where processors are scarce. The guest runs meanwhile, and what is
# for it waits at its destination: that costs less than what would be lost.
DRAIN_TIMEOUT_S: Final = 0.25
DRAIN_POLL_S: Final = 0.001
DRAIN_POLLS: Final = 2


class Taps:
    """As last seen. Names come from Open vSwitch's database, their numbers from the bridge itself."""

    def __init__(self, settings: NetworkSettings, database: str, ovs_ports: OvsPorts, bridge: Bridge) -> None:
        """`database`: Open vSwitch's, as ovs-vsctl names it."""
        self._settings = settings
        self._database = database
        self._ovs_ports = ovs_ports
        self._bridge = bridge
        self._taps: dict[Key, str] = {}
        self._new_taps: dict[Key, str] = {}
        self._kept_from_flooding: dict[str, tuple[int, int]] = {}
        self.plugged: tuple[GuestPort, ...] = ()
        """Guests' ports that the bridge has."""

    def bind(self, bound: Mapping[str, str]) -> None:
        """Goes on from what `bound` gave to an earlier life of the agent."""
        for text, name in bound.items():
            tunnel, _, mac = text.partition("/")
            self._taps[Key(int(tunnel), mac)] = name

    def bound(self) -> dict[str, str]:
        """The interfaces of ports that are here, by "tunnel/mac"."""
        return {f"{key.tunnel}/{key.mac}": name for key, name in self._taps.items()}

    def of(self, key: Key) -> Tap | None:
        """The port's tap, if the bridge has it."""
        return self._numbered(self._taps.get(key, ""))

    def new(self, key: Key) -> Tap | None:
        """The tap of a guest that comes, if the bridge has it."""
        return self._numbered(self._new_taps.get(key, ""))

    def knows(self, key: Key) -> bool:
        """The port has a tap here, and had before any that is new."""
        return key in self._taps

    def interface(self, key: Key) -> str:
        """The name of its newest tap; empty when there is none."""
        return self._new_taps.get(key) or self._taps.get(key, "")

    async def drain(self, key: Key) -> bool:
        """Waits until QEMU has read what is in the port's tap, to which no frames go any more; False if it does not.

        A frame that is nobody's goes in last; QEMU has come to it once the count of frames read has moved, and stands
        still. If it has read more than that one, there may be more: QEMU pauses within a long queue, and Open vSwitch
        sends some frames after those that its flows have turned away, out of its cache. Then it is tried again.
        """
        name, tap = self._taps.get(key, ""), self.of(key)
        if tap is None:
            return True
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                while await self._read_until_nobodys(name, tap) > 1:
                    pass
                return True
        except TimeoutError:
            return False
        except OSError as error:
            log.warning("it can't be seen what is in a tap", tap=name, error=str(error))
            return False

    async def _read_until_nobodys(self, name: str, tap: Tap) -> int:
        """Puts a frame that is nobody's into a tap; returns how many QEMU has read when it reads no more."""
        before = last = plumbing.frames_read(name)
        self._bridge.send((Output(tap.ofport),), NOBODYS_FRAME)
        still = 0
        while still < DRAIN_POLLS:
            await asyncio.sleep(DRAIN_POLL_S)
            now = plumbing.frames_read(name)
            still = still + 1 if now == last != before else 0
            last = now
        return last - before

    def take_over(self, key: Key) -> None:
        """The new tap is the port's tap."""
        if key in self._new_taps:
            self._taps[key] = self._new_taps.pop(key)

    def forget_new(self, key: Key) -> None:
        """The new tap is none of the port's."""
        self._new_taps.pop(key, None)

    async def find(self, attachments: Collection[Attachment], coming: Collection[str]) -> bool:
        """Looks for the taps of these ports; tells whether those that are not new have changed.

        `coming`: UUIDs of guests that come. Without an answer, everything is as it was.
        """
        if self._bridge.numbers and self._settings.tunnel_port not in self._bridge.numbers:
            await self._make_tunnel_port()
        try:
            plugged = await self._ovs_ports.read()
        except HandoffError as error:
            log.warning("taps are as they were last seen", error=error.message)
            return False
        self.plugged = tuple(
            port for port in plugged if port.bridge == self._settings.bridge and port.name in self._bridge.numbers
        )
        return self.match(attachments, coming)

    def match(self, attachments: Collection[Attachment], coming: Collection[str]) -> bool:
        """As `find`, without looking again at what is plugged in."""
        candidates: dict[tuple[str, str], list[str]] = {}
        for port in sorted(self.plugged, key=lambda port: port.ofport):
            candidates.setdefault((port.domain_uuid, port.mac), []).append(port.name)
        before, self._taps, self._new_taps = self._taps, {}, {}
        for each in attachments:
            found = candidates.get((each.domain_uuid, each.key.mac), ())
            tap, new_tap = names(each, found, before.get(each.key, ""), comes=each.domain_uuid in coming)
            self._taps.update({each.key: tap} if tap else {})
            self._new_taps.update({each.key: new_tap} if new_tap else {})
        return self._taps != before

    async def keep_from_site(self, closed: Collection[str], fresh: Callable[[str], bool]) -> None:
        """Has the site's floods leave the tenants' ports alone, those too that are `closed`.

        Once a port and connection: a switch that starts again has forgotten it. What has come into one that is `fresh`
        until then is thrown away.
        """
        numbers = self._bridge.numbers
        self._kept_from_flooding = {name: mark for name, mark in self._kept_from_flooding.items() if name in numbers}
        for name in {self._settings.tunnel_port, *self._taps.values(), *self._new_taps.values(), *closed}:
            number = self._bridge.numbers.get(name)
            if number is None or (mark := (self._bridge.connections, number)) == self._kept_from_flooding.get(name):
                continue
            try:
                await plumbing.keep_from_flooding(self._settings.management_socket(), name)
            except HandoffError as error:
                log.warning("the site's floods reach a tenant's port", port=name, error=error.message)
                continue
            if name not in self._kept_from_flooding and fresh(name):
                _empty(name)
            self._kept_from_flooding[name] = mark

    def lengthen_queues(self, keys: Iterable[Key]) -> None:
        """Lets new taps keep more for a guest that does not run yet. Blocking, for a moment."""
        for tap in (self._new_taps[key] for key in keys if key in self._new_taps):
            try:
                plumbing.lengthen_queue(tap)
            except OSError as error:
                log.warning("a tap keeps its short queue", tap=tap, error=str(error))

    def _numbered(self, name: str) -> Tap | None:
        number = self._bridge.numbers.get(name)
        return None if number is None else Tap(number)

    async def _make_tunnel_port(self) -> None:
        settings = self._settings
        try:
            await plumbing.make_tunnel_port(
                self._database, settings.bridge, settings.tunnel_port, settings.tunnel_address
            )
        except HandoffError as error:
            log.warning("no port to the other hosts", error=error.message)


def _empty(tap: str) -> None:
    try:
        plumbing.empty_queue(tap)
    except OSError as error:
        log.warning("what the site has sent may wait in a tenant's tap", tap=tap, error=str(error))
