"""Guests' ports of which the leader has not told yet: whose they are by the guests' own definitions.

    plugged in ── in doubt: takes nothing from the guest ──┬── its definition names the port ── its tenant's
                                                           ├── it names it wrongly           ── nobody's: closed
                                                           ├── it does not                   ── the site's
                                                           └── no answer for DOUBT_S         ── the site's, so far

libvirt plugs a guest in before it starts QEMU, so the doubt is over before the guest runs. It is bounded all the same:
a libvirtd that does not answer starts no guests, and one of the site's that does run must not wait for it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import libvirt
import structlog

from handoff_agent.guests import parse_domain
from handoff_agent.network.metadata import NO_TUNNEL, read_claims
from handoff_agent.network.treatment import Attachment
from handoff_agent.ovs_ports import GuestPort
from handoff_agent.slots import Hypervisor, Slot
from handoff_common.errors import HandoffError, NotFoundError

log = structlog.get_logger()

DOUBT_S: Final = 10
ANSWER_TIMEOUT_S: Final = 3.0
ASK_AGAIN_S: Final = 1.0
# libvirt answers for a guest that it is starting only between two steps of that: the others must not wait behind it.
AT_ONCE: Final = 2

Definition: TypeAlias = Callable[[str], Awaitable[tuple[Attachment, ...]]]
"""The tenants' ports of the guest with this UUID, as `read_claims` gives them; none for a guest that there is not.

Raises HandoffError while that can't be known.
"""


async def definition_of(hypervisor: Hypervisor, uuid: str) -> tuple[Attachment, ...]:
    """A guest's ports by its definition in whichever slot has it, the one where it is active first.

    Raises HandoffError when no slot has it and one does not answer.
    """
    found: list[tuple[bool, str]] = []
    silent: HandoffError | None = None
    for answer in await asyncio.gather(*(_ask(slot, uuid) for slot in hypervisor.slots), return_exceptions=True):
        match answer:
            case NotFoundError():
                continue
            case HandoffError():
                silent = answer
            case BaseException():
                raise answer
            case _:
                found.append(answer)
    if found:
        return read_claims(parse_domain(max(found)[1]))
    if silent is not None:
        raise silent
    return ()


async def _ask(slot: Slot, uuid: str) -> tuple[bool, str]:
    def read(connection: libvirt.virConnect) -> tuple[bool, str]:
        domain = connection.lookupByUUIDString(uuid)
        return bool(domain.isActive()), domain.XMLDesc(0)

    return await slot.call(read, ANSWER_TIMEOUT_S)


@dataclass(slots=True)
class _Sight:
    """A port that is plugged in."""

    port: GuestPort
    doubt_ends_s: float
    """By the loop's clock; the past for a port that was there before the agent."""
    is_known: bool = False
    claim: Attachment | None = None


class Newcomers:
    """The guests' ports on the bridge. `run` it as a task."""

    def __init__(self, definition: Definition, changed: Callable[[], None]) -> None:
        """`changed` is called when it is known whose a port is."""
        self._definition = definition
        self._changed = changed
        self._sights: dict[str, _Sight] = {}
        self._asking: set[str] = set()
        self._woken = asyncio.Event()
        self._answered = asyncio.Event()
        self._at_once = asyncio.Semaphore(AT_ONCE)

    def see(self, plugged: Iterable[GuestPort], *, are_new: bool) -> list[GuestPort]:
        """These are plugged in now. Returns those that were not before; `are_new`: they have just been."""
        ports = {port.name: port for port in plugged}
        self._sights = {
            name: sight for name, sight in self._sights.items() if name in ports and _is_same(sight.port, ports[name])
        }
        unseen = [port for name, port in ports.items() if name not in self._sights]
        for port in unseen:
            self._sights[port.name] = _Sight(port, _now() + DOUBT_S if are_new else 0.0)
        if unseen:
            self._woken.set()
        return unseen

    def claims(self) -> list[Attachment]:
        """What the guests' definitions say of them, the oldest port first."""
        claims = (sight.claim for sight in self._sights.values() if sight.claim is not None)
        return [claim for claim in claims if claim.key.tunnel != NO_TUNNEL]

    def is_claimed(self, name: str) -> bool:
        """The port's guest says that it is a tenant's."""
        sight = self._sights.get(name)
        return sight is not None and sight.claim is not None

    def is_in_doubt(self, name: str) -> bool:
        """It is new, and not known yet whose it is."""
        sight = self._sights.get(name)
        return sight is not None and not sight.is_known and _now() < sight.doubt_ends_s

    def is_fresh(self, name: str) -> bool:
        """It is new, and not the site's: nobody has sent its guest anything yet."""
        sight = self._sights.get(name)
        if sight is None or (sight.is_known and sight.claim is None):
            return False
        return _now() < sight.doubt_ends_s

    async def settle(self, timeout_s: float) -> bool:
        """Waits until it is known whose all of them are; tells whether it is."""
        try:
            async with asyncio.timeout(timeout_s):
                while any(not sight.is_known for sight in self._sights.values()):
                    self._answered.clear()
                    await self._answered.wait()
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Asks whose the ports are, for ever."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._woken.clear()
                for uuid in {sight.port.domain_uuid for sight in self._sights.values() if not sight.is_known}:
                    if uuid not in self._asking:
                        self._asking.add(uuid)
                        group.create_task(self._learn(uuid), name=f"whose ports {uuid} has")
                await self._woken.wait()

    async def _learn(self, uuid: str) -> None:
        problem = ""
        try:
            while waiting := self._unknown(uuid):
                try:
                    async with self._at_once:
                        ports = await self._definition(uuid)
                except Exception as error:  # noqa: BLE001 - the other guests' ports must not suffer from a bug
                    if (why := _why(error)) != problem:
                        problem = why
                        log.warning("it is not known whose a guest's ports are", guest=uuid, error=problem)
                    await asyncio.sleep(ASK_AGAIN_S)
                    continue
                by_mac = {each.key.mac: each for each in ports}
                for sight in waiting:
                    sight.claim, sight.is_known = by_mac.get(sight.port.mac), True
                self._answered.set()
                self._changed()
        finally:
            self._asking.discard(uuid)

    def _unknown(self, uuid: str) -> list[_Sight]:
        return [sight for sight in self._sights.values() if sight.port.domain_uuid == uuid and not sight.is_known]


def admitted(recorded: Collection[Attachment], claims: Sequence[Attachment]) -> list[Attachment]:
    """The claims that take no MAC or address of their tenant from a recorded port, or from an earlier claim. Pure."""
    macs = {each.key for each in recorded}
    addresses = {(each.key.tunnel, address) for each in recorded for address in each.addresses}
    found = []
    for claim in claims:
        own = {(claim.key.tunnel, address) for address in claim.addresses}
        if claim.key in macs or own & addresses:
            continue
        macs.add(claim.key)
        addresses |= own
        found.append(claim)
    return found


def _why(error: Exception) -> str:
    if isinstance(error, HandoffError):
        return error.message
    return f"{type(error).__name__}: {error}; this is a bug in the agent"


def _now() -> float:
    return asyncio.get_running_loop().time()


def _is_same(one: GuestPort, other: GuestPort) -> bool:
    """The same plugging-in: a switch that starts again may number it differently."""
    return (one.mac, one.domain_uuid) == (other.mac, other.domain_uuid)
