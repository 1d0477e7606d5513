"""What becomes of a guest's frames while it moves.

    source                                    destination
                                              created    the new taps wait: what comes for the guest through a
                                                         tunnel goes into them; who is on this host still sends to S
    pausing    frames go to D's tunnel, or
               to the new tap on this host
               (D's taps queue them)          running    the guest takes what has queued
               the leader points all others at D; D's bridge has the guest as its own by the same word
    released   nothing goes on to D any more  finalize   in an upgrade the new taps are the guest's
    back       frames go to the guest again   undo       nothing waits any more

Frames are sent on while the guest still runs, a moment before it stops: it is stopped once QEMU has read what was in
its old tap by then, and what comes later waits at the other side. So none is lost between the two, and none is seen
twice.
"""

from collections.abc import Sequence

from handoff_agent.companions import DestinationCompanion, SourceCompanion
from handoff_agent.guests import parse_domain
from handoff_agent.handoff import Handoff
from handoff_agent.local_sockets import is_local
from handoff_agent.network.metadata import read_ports
from handoff_agent.network.network import Network
from handoff_agent.network.treatment import HERE
from handoff_agent.slots import Slot


class LeavingPorts(SourceCompanion):
    """The ports of a guest that leaves."""

    def __init__(self, network: Network, handoff: Handoff) -> None:
        self._network = network
        self._handoff = handoff

    async def begin(self) -> None:
        """The way to its destination is tried before it is needed: what comes before its answer is lost."""
        record = self._handoff.record
        if (destination := self._destination()) is not None:
            self._network.explore(record.domain_uuid, [destination])

    async def ordered(self) -> None:
        """As at the beginning: one try, or the answer to it, may have been lost."""
        await self.begin()

    async def pausing(self) -> None:
        """Its frames go to its destination; nothing happens when that manages no flows."""
        if (destination := self._destination()) is not None:
            await self._network.redirect(self._handoff.record.domain_uuid, destination)
            await self._network.drain(self._handoff.record.domain_uuid)

    async def paused(self) -> None:
        """As before the pause, if there was a moment before it; and so it stays, whatever becomes of the agent."""
        if (destination := self._destination()) is not None:
            await self._network.leave(self._handoff.record.domain_uuid, destination)

    async def held_again(self) -> None:
        """What an earlier life of the agent could not keep for this one."""
        await self.paused()

    async def back(self) -> None:
        """They are its own again."""
        await self._network.stay(self._handoff.record.domain_uuid)

    async def released(self) -> None:
        """They are no more business of this host."""
        await self._network.gone(self._handoff.record.domain_uuid)

    def _destination(self) -> str | None:
        record = self._handoff.record
        return HERE if is_local(record.transfer_uri) else (record.tunnel_address or None)


class ComingPorts(DestinationCompanion):
    """The ports of a guest that comes."""

    def __init__(self, network: Network, handoff: Handoff, slot: Slot) -> None:
        self._network = network
        self._handoff = handoff
        self._slot = slot

    async def created(self) -> None:
        """Its taps wait for what its source sends on. Raises as Network.expect and Slot.call do."""
        record = self._handoff.record
        xml = await self._slot.on_domain(record.domain_uuid, lambda domain: str(domain.XMLDesc(0)))
        ports = read_ports(parse_domain(xml))
        if ports:
            await self._network.expect(record.domain_uuid, ports)
            await self._handoff.change(tunnel_address=str(self._network.settings.tunnel_address))

    async def finalize(self) -> None:
        """They are ports of this host."""
        await self._network.settled(self._handoff.record.domain_uuid)

    async def undo(self) -> None:
        """Nothing is left of them."""
        await self._network.not_coming(self._handoff.record.domain_uuid)


class NetworkCompanions:
    """The network of every guest goes with it, on a host whose agent manages flows."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def of_source(self, handoff: Handoff, slot: Slot) -> Sequence[SourceCompanion]:
        """Its ports."""
        return (LeavingPorts(self._network, handoff),)

    def of_destination(self, handoff: Handoff, slot: Slot) -> Sequence[DestinationCompanion]:
        """Its ports."""
        return (ComingPorts(self._network, handoff, slot),)
