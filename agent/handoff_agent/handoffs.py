"""All handoffs of this agent, with their records: begun, found, adopted after a restart, and remembered when over."""

import asyncio
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import structlog

from handoff.agent.v1 import qemu_pb2 as pb
from handoff.agent.v1 import types_pb2 as types
from handoff.agent.v1.disk_pb2 import DiskMove
from handoff_agent.arrival import DEFAULT_SLOT, Arrivals
from handoff_agent.companions import Companions, NoCompanions
from handoff_agent.departure import Departures
from handoff_agent.destination import DestinationHandoff, Folder, Listener
from handoff_agent.disks.moves import moves_of, promises, recorded, restore_facts
from handoff_agent.disks.plan import PULL
from handoff_agent.disks.rewrite import with_disks
from handoff_agent.disks.space import Promise
from handoff_agent.handoff import Handoff
from handoff_agent.handoff_changes import HandoffChanges
from handoff_agent.ledger import Ledger, Record, TermGuard
from handoff_agent.local_sockets import LocalSockets, cpr_socket
from handoff_agent.passing import Receiver
from handoff_agent.rules import (
    ABORTED,
    DESTINATION,
    FAILED,
    FINAL_STATES,
    PREPARED,
    SOURCE,
    Answer,
    Call,
    Role,
    judge,
    role_name,
)
from handoff_agent.slots import Hypervisor, Slot
from handoff_agent.source import SourceHandoff
from handoff_agent.survey import LOCAL_METHODS
from handoff_common.errors import (
    ExhaustedError,
    InvalidArgumentError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)

log = structlog.get_logger()

_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


class Handoffs:
    """The registry. Use it on the asyncio loop only."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        departures: Departures,
        arrivals: Arrivals,
        listener: Listener,
        sockets: LocalSockets,
        ledger: Ledger,
        term_guard: TermGuard,
        changes: HandoffChanges,
        companions: Companions | None = None,
    ) -> None:
        self._hypervisor = hypervisor
        self._departures = departures
        self._arrivals = arrivals
        self._listener = listener
        self._sockets = sockets
        self._ledger = ledger
        self._term_guard = term_guard
        self._changes = changes
        self._companions = companions or NoCompanions()
        self._handoffs: dict[tuple[str, Role], Handoff] = {}
        self._preparing = asyncio.Lock()
        # One thread: records reach the disk in the order in which they changed.
        self._disk = ThreadPoolExecutor(1, "ledger")

    async def open(self) -> None:
        """Reads the records and takes up what is under way."""
        loop = asyncio.get_running_loop()
        for record in await loop.run_in_executor(self._disk, self._ledger.load, time.time()):
            handoff = self._make(record)
            match handoff:
                case SourceHandoff():
                    handoff.adopt()
                case DestinationHandoff():
                    handoff.watch()

    async def close(self) -> None:
        """Lets go of everything; guests, domains and transfers stay as they are."""
        for handoff in self._handoffs.values():
            if isinstance(handoff, SourceHandoff | DestinationHandoff):
                await handoff.detach()
        self._disk.shutdown(wait=True)

    @property
    def term(self) -> int:
        """Highest term seen."""
        return self._term_guard.term

    async def admit(self, fence: types.Fence) -> None:
        """Lets a call of the present leader pass. Raises StaleTermError for a replaced one's."""
        if fence.term <= 0:
            raise InvalidArgumentError("fence: the call needs its leader's term")
        if fence.term > self._term_guard.term:
            await asyncio.get_running_loop().run_in_executor(self._disk, self._term_guard.admit, fence)
        else:
            self._term_guard.admit(fence)

    # Finding.

    def all(self) -> Sequence[Handoff]:
        """All that are remembered."""
        return tuple(self._handoffs.values())

    def get(self, migration_id: str, role: Role) -> Handoff:
        """One of them; without a role, the one that there is. Raises NotFoundError."""
        roles = (role,) if role else (SOURCE, DESTINATION)
        for each in roles:
            if (handoff := self._handoffs.get((migration_id, each))) is not None:
                return handoff
        side = f" as its {role_name(role)}" if role else ""
        raise NotFoundError(f"this agent has not heard of handoff {migration_id}{side}")

    def source(self, migration_id: str, call: Call) -> SourceHandoff:
        """The source's side that `call` is meant for. Raises PreconditionError when there is none, or a tombstone."""
        handoff = self._handoffs.get((migration_id, SOURCE))
        if isinstance(handoff, SourceHandoff):
            return handoff
        raise _refused(migration_id, call, SOURCE, handoff)

    def destination(self, migration_id: str, call: Call) -> DestinationHandoff:
        """The destination's side that `call` is meant for. Raises as `source` does."""
        handoff = self._handoffs.get((migration_id, DESTINATION))
        if isinstance(handoff, DestinationHandoff):
            return handoff
        raise _refused(migration_id, call, DESTINATION, handoff)

    def migration_of(self, uuid: str) -> str:
        """The migration that the domain is part of now; empty when none."""
        return next(
            (
                handoff.record.migration_id
                for handoff in self._handoffs.values()
                if handoff.record.domain_uuid == uuid and handoff.state not in FINAL_STATES
            ),
            "",
        )

    def leaving(self) -> frozenset[str]:
        """The guests, by UUID, that may leave: their source's side has not ended."""
        records = [handoff.record for handoff in self._handoffs.values() if handoff.state not in FINAL_STATES]
        return frozenset(record.domain_uuid for record in records if record.role == SOURCE)

    # Beginning and ending.

    async def prepare_source(
        self,
        migration_id: str,
        uuid: str,
        *,
        validate_only: bool,
        local: bool = False,
        disks: Sequence[DiskMove] = (),
    ) -> tuple[pb.Handoff, pb.SourceGuest]:
        """Begins the source's side, or answers with the one that there is. `disks`: the plan for them."""
        if validate_only:
            self._refuse_second(migration_id, SOURCE, uuid)
            return pb.Handoff(), await self._departures.examine(uuid, local=local)
        async with self._preparing:
            if self._proceeds(migration_id, SOURCE):
                handoff, guest = await self._begin_source(migration_id, uuid, local=local, disks=disks)
                return handoff.to_message(), guest
            handoff = self.get(migration_id, SOURCE)
            if isinstance(handoff, SourceHandoff):
                await handoff.prepare()
        try:
            guest = await self._departures.read(handoff.record.domain_uuid, local=local)
            guest.autostart = handoff.record.autostart
            restore_facts(guest.disks, moves_of(handoff.record))
        except NotFoundError:
            guest = pb.SourceGuest()
        return handoff.to_message(), guest

    async def _begin_source(
        self, migration_id: str, uuid: str, *, local: bool, disks: Sequence[DiskMove]
    ) -> tuple[Handoff, pb.SourceGuest]:
        self._refuse_second(migration_id, SOURCE, uuid)
        if (leftover := self._leftover(migration_id, uuid, DESTINATION)) is not None:
            raise UnavailableError(leftover)
        guest = await self._departures.examine(uuid, local=local)
        record = Record(
            migration_id=migration_id,
            role=SOURCE,
            state=PREPARED,
            domain_uuid=guest.domain.uuid,
            domain_name=guest.domain.name,
            slot=guest.domain.slot,
            was_running=guest.domain.state == types.DOMAIN_STATE_RUNNING,
            autostart=guest.autostart,
            disks=recorded(disks),
            changed_s=time.time(),
        )
        await self._save(record)
        handoff = self._make(record)
        assert isinstance(handoff, SourceHandoff)
        await handoff.prepare()
        restore_facts(guest.disks, moves_of(handoff.record))
        self._announce(handoff)
        return handoff, guest

    async def prepare_destination(
        self,
        migration_id: str,
        guest: pb.SourceGuest,
        slot_name: str,
        *,
        validate_only: bool,
        method: pb.TransferMethod.ValueType = pb.TRANSFER_METHOD_TCP,
        emulator: str = "",
        fast: bool = False,
        bandwidth_bytes_per_s: int = 0,
    ) -> pb.PrepareDestinationResponse:
        """Begins the destination's side, or answers with the one that there is.

        `fast`: its disks are pulled, at this rate at the most.
        """
        slot_name = slot_name or DEFAULT_SLOT
        folder = self._sockets.folder(migration_id)
        if validate_only:
            if (leftover := self._leftover(migration_id, guest.domain.uuid, SOURCE, DESTINATION)) is not None:
                raise PreconditionError(leftover)
            arrival = await self._arrivals.examine(
                guest, slot_name, method, emulator, fast=fast, promises=self._promises()
            )
            return pb.PrepareDestinationResponse(
                handoff=pb.Handoff(disks=arrival.disks), cpr_obstacles=arrival.cpr_obstacles
            )
        async with self._preparing:
            if not self._proceeds(migration_id, DESTINATION):
                return pb.PrepareDestinationResponse(handoff=self.get(migration_id, DESTINATION).to_message())
            if (leftover := self._leftover(migration_id, guest.domain.uuid, SOURCE, DESTINATION)) is not None:
                raise UnavailableError(leftover)
            arrival = await self._arrivals.examine(
                guest, slot_name, method, emulator, cpr_socket(folder), fast=fast, promises=self._promises()
            )
            record = Record(
                migration_id=migration_id,
                role=DESTINATION,
                state=PREPARED,
                domain_uuid=guest.domain.uuid,
                domain_name=guest.domain.name,
                slot=slot_name,
                was_running=guest.domain.state == types.DOMAIN_STATE_RUNNING,
                autostart=guest.autostart,
                persistent_xml=with_disks(arrival.persistent_xml, arrival.disks, running=False),
                disks=recorded(arrival.disks),
                bandwidth_bytes_per_s=bandwidth_bytes_per_s,
                pulling=any(move.strategy == PULL for move in arrival.disks),
                changed_s=time.time(),
            )
            handoff = self._make_destination(record, self._hypervisor.slot(slot_name))
            entrance = (
                Folder(folder, passes_on=method == pb.TRANSFER_METHOD_CPR, multifd=arrival.multifd)
                if method in LOCAL_METHODS
                else self._listener
            )
            # Before the domain exists: an agent that dies in between finds what to remove.
            await self._save(record)
            try:
                await handoff.create(arrival.create_xml, entrance)
            except BaseException:
                if handoff.left_behind:
                    self._handoffs[migration_id, DESTINATION] = handoff
                    handoff.watch()
                else:
                    await asyncio.get_running_loop().run_in_executor(self._disk, self._ledger.remove, record)
                raise
            self._handoffs[migration_id, DESTINATION] = handoff
            self._announce(handoff)
            return pb.PrepareDestinationResponse(handoff=handoff.to_message())

    async def abort(self, migration_id: str, role: Role, reason: str, *, fenced: bool = False) -> pb.Handoff:
        """Undoes one side; remembers one that was never heard of as aborted, so that it can't begin later.

        `fenced`: this host was, so the destination's copy goes even if it ran.
        """
        if role not in (SOURCE, DESTINATION):
            raise InvalidArgumentError("role: say which side to abort")
        handoff = self._handoffs.get((migration_id, role))
        if handoff is None:
            self._check_id(migration_id)
            # A Prepare that is under way is waited for and then undone.
            async with self._preparing:
                handoff = self._handoffs.get((migration_id, role)) or await self._remember_aborted(
                    migration_id, role, reason
                )
        match handoff:
            case SourceHandoff():
                await handoff.abort(reason)
            case DestinationHandoff():
                await handoff.abort(reason, fenced=fenced)
        return handoff.to_message()

    async def _remember_aborted(self, migration_id: str, role: Role, reason: str) -> Handoff:
        record = Record(migration_id=migration_id, role=role, state=ABORTED, message=reason, changed_s=time.time())
        await self._save(record)
        return self._make(record)

    def _proceeds(self, migration_id: str, role: Role) -> bool:
        self._check_id(migration_id)
        known = self._handoffs.get((migration_id, role))
        verdict = judge(Call.PREPARE, role, known.state if known else None)
        if verdict.answer is Answer.REFUSE:
            raise PreconditionError(f"handoff {migration_id}: {verdict.message}")
        return verdict.answer is Answer.PROCEED

    def _refuse_second(self, migration_id: str, role: Role, uuid: str) -> None:
        for record in (handoff.record for handoff in self._handoffs.values()):
            is_other = (record.domain_uuid, record.role) == (uuid, role) and record.migration_id != migration_id
            if is_other and record.state not in FINAL_STATES and record.state != FAILED:
                raise PreconditionError(
                    f"guest {record.domain_name} is part of migration {record.migration_id}; wait for its end, or"
                    " cancel it"
                )

    def _leftover(self, migration_id: str, uuid: str, *roles: Role) -> str | None:
        """What an earlier migration of the guest still has to settle here: its orders would reach the new copy."""
        for record in (handoff.record for handoff in self._handoffs.values()):
            is_other = record.domain_uuid == uuid and record.migration_id != migration_id
            if is_other and record.role in roles and record.state not in FINAL_STATES:
                return (
                    f"what migration {record.migration_id} left of guest {record.domain_name} on this host is not"
                    " settled yet; the leader does that within seconds of reaching the host: try again then"
                )
        return None

    def _promises(self) -> Sequence[Promise]:
        return promises(handoff.record for handoff in self._handoffs.values())

    def _check_id(self, migration_id: str) -> None:
        if not _ID.fullmatch(migration_id):
            raise InvalidArgumentError(f"migration_id {migration_id!r}: letters, digits, '_', '-' and '.' only")

    def _make(self, record: Record) -> Handoff:
        """The object for a record; one without a slot is only remembered."""
        slot = next((slot for slot in self._hypervisor.slots if slot.name == record.slot), None)
        handoff: Handoff
        if slot is None:
            handoff = Handoff(record, self._save, self._changes.publish)
        elif record.role == SOURCE:
            handoff = self._make_source(record, slot)
        else:
            handoff = self._make_destination(record, slot)
        self._handoffs[record.migration_id, record.role] = handoff
        return handoff

    def _make_source(self, record: Record, slot: Slot) -> SourceHandoff:
        handoff = SourceHandoff(
            record, self._save, self._changes.publish, slot, lambda: self._receiver(record.migration_id)
        )
        handoff.companions = self._companions.of_source(handoff, slot)
        return handoff

    def _make_destination(self, record: Record, slot: Slot) -> DestinationHandoff:
        handoff = DestinationHandoff(record, self._save, self._changes.publish, slot, self._sockets)
        handoff.companions = self._companions.of_destination(handoff, slot)
        return handoff

    def _receiver(self, migration_id: str) -> Receiver:
        handoff = self.get(migration_id, DESTINATION)
        if not isinstance(handoff, DestinationHandoff):
            raise NotFoundError(f"handoff {migration_id} was aborted at the destination")
        return handoff

    def _announce(self, handoff: Handoff) -> None:
        record = handoff.record
        handoff.log.info("handoff", state="PREPARED", role=role_name(record.role))
        self._changes.publish(record.migration_id)

    async def _save(self, record: Record) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._disk, self._ledger.save, record)
        except OSError as error:
            raise ExhaustedError(
                f"handoff {record.migration_id} can't be written down: {error.strerror}; look at the agent's state_dir"
            ) from error


def _refused(migration_id: str, call: Call, role: Role, handoff: Handoff | None) -> PreconditionError:
    verdict = judge(call, role, handoff.state if handoff else None)
    return PreconditionError(f"handoff {migration_id}: {verdict.message}")
