"""What the agent must remember beyond its own life: its handoffs, finished ones too, and the highest term.

One file a handoff and role, replaced atomically and on disk before the call that made it returns.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from handoff.agent.v1 import types_pb2
from handoff_agent.durable import DurableFolder
from handoff_agent.local_sockets import CPR
from handoff_agent.rules import FINAL_STATES, Role, State, role_name, state_name
from handoff_common.errors import StaleTermError

log = structlog.get_logger()

# Longer than any call may be delayed on its way; until then a finished handoff can't be begun anew.
TOMBSTONE_LIFE_S: Final = 7 * 24 * 3600.0
# Enough to bring some moves to their ends on a full disk.
SPARE_RECORDS: Final = 8
SPARE_TERMS: Final = 2


@dataclass(frozen=True, slots=True)
class Record:
    """One side of a handoff. Times are seconds since the epoch; 0 stands for not yet, or not of this role."""

    migration_id: str
    role: Role
    state: State
    domain_uuid: str = ""
    domain_name: str = ""
    slot: str = ""
    was_running: bool = False
    message: str = ""
    changed_s: float = 0.0
    autostart: bool = False
    """Source: as it was before the handoff turned it off. Destination: as it will be."""

    bandwidth_bytes_per_s: int = 0
    downtime_limit_ms: int = 0
    switch_deadline_s: float = 0.0
    transfer_uri: str = ""
    """Source: where the guest is sent."""
    tunnel_address: str = ""
    """Tunnel endpoint of the destination, where the guest's frames go from the pause on."""
    started_s: float = 0.0
    paused_s: float = 0.0
    paused_to_held_ms: float = 0.0
    qemu_downtime_ms: int = 0
    paused_to_resumed_ms: float = 0.0

    listen_uri: str = ""
    """Destination: empty until its domain listens; a record without one is of an agent that died before that."""
    persistent_xml: str = ""
    """The definition to keep; empty when the guest has none."""
    activating: bool = False
    """Written before the guest is told to run: from here on its copy may have run."""
    never_ran: bool = False
    ended: bool = False
    """The guest ran here, and its QEMU had ended when the handoff did."""
    running_s: float = 0.0
    call_to_running_ms: float = 0.0

    disks: tuple[str, ...] = ()
    """The plan for its disks: DiskMove messages as JSON; see disks/moves.py."""
    pulling: bool = False
    """Destination: some disk still needs the source's."""
    keep_disks: bool = False
    """Source: the images of its disks stay when it is released."""

    @property
    def passes_on(self) -> bool:
        """Source: the memory is passed on by descriptor, not copied."""
        return self.transfer_uri.startswith(CPR)


class Ledger:
    """The records of one agent. Blocking: call it on a thread."""

    def __init__(self, state_dir: Path) -> None:
        """Makes the folder. Only its owner may read it: definitions have secrets in them."""
        self._folder = state_dir / "handoffs"
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._durable = DurableFolder(self._folder, SPARE_RECORDS)

    def load(self, now_s: float) -> list[Record]:
        """Reads all records. Forgets those that have been final for a week; sets one aside that can't be read."""
        return list(self._read_all(now_s))

    def save(self, record: Record) -> None:
        """Writes a record; on return it is on disk. Raises OSError when that can't be."""
        self._durable.replace(self._path(record), json.dumps(dataclasses.asdict(record), indent=1))

    def remove(self, record: Record) -> None:
        """Forgets a handoff that was never begun."""
        self._path(record).unlink(missing_ok=True)

    def _path(self, record: Record) -> Path:
        return self._folder / f"{record.migration_id}.{role_name(record.role)}.json"

    def _read_all(self, now_s: float) -> Iterator[Record]:
        for path in sorted(self._folder.glob("*.json")):
            try:
                record = _parse(path.read_text())
            except (ValueError, TypeError) as error:
                aside = path.with_suffix(".unreadable")
                log.error("handoff record can't be read", path=str(aside), error=str(error))
                path.rename(aside)
                continue
            if record.state in FINAL_STATES and now_s - record.changed_s > TOMBSTONE_LIFE_S:
                path.unlink()
                log.debug("old handoff forgotten", migration=record.migration_id, state=state_name(record.state))
                continue
            yield record


def _parse(text: str) -> Record:
    values = json.loads(text)
    known = {field.name for field in dataclasses.fields(Record)}
    for key, value in values.items():
        values[key] = tuple(value) if isinstance(value, list) else value
    return Record(**{key: value for key, value in values.items() if key in known})


class TermGuard:
    """Refuses the orders of replaced leaders."""

    def __init__(self, state_dir: Path) -> None:
        """Reads the highest term seen; blocking."""
        self._path = state_dir / "term"
        state_dir.mkdir(parents=True, exist_ok=True)
        self._durable = DurableFolder(state_dir, SPARE_TERMS)
        self.term, self.leader = 0, ""
        if self._path.exists():
            values = json.loads(self._path.read_text())
            self.term, self.leader = int(values["term"]), str(values["leader"])

    def admit(self, fence: types_pb2.Fence) -> None:
        """Lets a call of the present term pass; a higher term is on disk when this returns (blocking only then).

        Raises StaleTermError for a lower one.
        """
        if fence.term < self.term:
            raise StaleTermError(
                f"term {fence.term} of controller {fence.leader or 'without a name'} is over: this agent has obeyed"
                f" term {self.term} of controller {self.leader or 'without a name'}"
            )
        if fence.term > self.term:
            self._durable.replace(
                self._path, json.dumps({"term": fence.term, "leader": fence.leader, "time": time.time()})
            )
            self.term, self.leader = fence.term, fence.leader
            log.info("new term", term=self.term, leader=self.leader)
