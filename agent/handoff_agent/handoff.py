"""One side of a handoff as the registry, the service and its watchers see it, whichever role."""

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypedDict, Unpack

import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from handoff.agent.v1 import disk_pb2
from handoff.agent.v1 import qemu_pb2 as pb
from handoff_agent.disks.moves import moves_of
from handoff_agent.ledger import Record
from handoff_agent.rules import DESTINATION, HELD, Answer, Call, State, judge, state_name
from handoff_common.errors import HandoffError, PreconditionError

log = structlog.get_logger()

Save = Callable[[Record], Awaitable[None]]
"""Puts a record on disk, after those of earlier calls. Raises ExhaustedError when that can't be."""
Notify = Callable[[str], None]
"""Told the migration's id at each change of state."""


class Changes(TypedDict, total=False):
    """What of a record can change."""

    state: State
    message: str
    was_running: bool
    autostart: bool
    bandwidth_bytes_per_s: int
    downtime_limit_ms: int
    switch_deadline_s: float
    transfer_uri: str
    tunnel_address: str
    started_s: float
    paused_s: float
    paused_to_held_ms: float
    qemu_downtime_ms: int
    paused_to_resumed_ms: float
    listen_uri: str
    activating: bool
    never_ran: bool
    ended: bool
    running_s: float
    call_to_running_ms: float
    disks: tuple[str, ...]
    pulling: bool
    keep_disks: bool


class Handoff:
    """A record with its watchers. Calls of the leader hold `lock`, one at a time.

    What others are told is what is on disk. A leader that heard HELD may run the other copy, so an agent that dies must
    find in its next life that it said so.
    """

    def __init__(self, record: Record, save: Save, notify: Notify) -> None:
        self.record = record
        self._told = record
        self.lock = asyncio.Lock()
        self.progress: pb.TransferProgress | None = None
        self.disk_progress: Sequence[disk_pb2.DiskProgress] = ()
        self._save = save
        self._notify = notify
        self._changed = asyncio.Event()
        self.log = log.bind(migration=record.migration_id, guest=record.domain_name, slot=record.slot)

    @property
    def state(self) -> State:
        """How far it is; others may have to wait for the disk to hear of it."""
        return self.record.state

    def permits(self, call: Call) -> bool:
        """True: carry the call out. False: it was; answer with the handoff. Raises PreconditionError otherwise."""
        verdict = judge(call, self.record.role, self.record.state)
        if verdict.answer is Answer.REFUSE:
            raise PreconditionError(f"handoff {self.record.migration_id}: {verdict.message}")
        return verdict.answer is Answer.PROCEED

    async def change(self, **changes: Unpack[Changes]) -> None:
        """Changes the record, which is on disk on return; then others are told. Raises as `Save` does.

        What can't be written is not so: the call is carried out again when it is repeated.
        """
        before = self.record.state
        self.record = record = dataclasses.replace(self.record, changed_s=time.time(), **changes)
        try:
            await self._save(record)
        except HandoffError:
            if self.record is record:
                self.record = self._told
            raise
        if record.state != before:
            self.log.info("handoff", state=state_name(record.state), before=state_name(before), message=record.message)
        told, self._told = self._told, record
        if record.state != told.state:
            self._wake()

    def next_change(self) -> asyncio.Event:
        """Is set when a change of state is told. Take it before you read the handoff, and nothing is missed."""
        return self._changed

    def _wake(self) -> None:
        waiting, self._changed = self._changed, asyncio.Event()
        waiting.set()
        self._notify(self.record.migration_id)

    def _progress(self) -> pb.TransferProgress | None:
        if not self.disk_progress:
            return self.progress
        progress = pb.TransferProgress(time=timestamp(time.time()), disks=self.disk_progress)
        if self.progress is not None:
            progress.MergeFrom(self.progress)
        return progress

    def to_message(self) -> pb.Handoff:
        """The handoff as the API shows it: as it is on disk."""
        record = self._told
        message = pb.Handoff(
            migration_id=record.migration_id,
            role=record.role,
            state=record.state,
            domain_uuid=record.domain_uuid,
            domain_name=record.domain_name,
            slot=record.slot,
            listen_uri=record.listen_uri,
            progress=self._progress(),
            message=record.message,
            never_ran=record.never_ran,
            was_running=record.was_running,
            disks=moves_of(record),
            pulling=record.pulling,
            ended=record.ended,
            tunnel_address=record.tunnel_address if record.role == DESTINATION else "",
        )
        if record.paused_s:
            message.switch_timings.CopyFrom(
                pb.SwitchTimings(
                    paused_time=timestamp(record.paused_s),
                    paused_to_held_ms=record.paused_to_held_ms,
                    qemu_downtime_ms=record.qemu_downtime_ms,
                    paused_to_resumed_ms=record.paused_to_resumed_ms,
                    held_for_ms=held_for_ms(record),
                )
            )
        if record.running_s:
            message.activate_timings.CopyFrom(
                pb.ActivateTimings(
                    call_to_running_ms=record.call_to_running_ms,
                    running_time=timestamp(record.running_s),
                    running_for_ms=max(0.0, 1000 * (time.time() - record.running_s)),
                )
            )
        return message


def timestamp(seconds: float) -> Timestamp:
    """Seconds since the epoch as protobuf's Timestamp."""
    whole = int(seconds)
    return Timestamp(seconds=whole, nanos=int((seconds - whole) * 1e9))


def held_for_ms(record: Record) -> float:
    """How long a source has been HELD by now, in milliseconds; 0 when it is not."""
    if record.state != HELD:
        return 0.0
    return max(0.0, 1000 * (time.time() - record.paused_s) - record.paused_to_held_ms)
