"""Which call is allowed in which state of a handoff. Pure; the whole protocol of one agent's side in two tables.

A call that was already carried out answers with the handoff as it stands. So does one that came too late because the
handoff FAILED: its state is the answer. What the table does not list is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias

from handoff.agent.v1 import qemu_pb2 as pb

Role: TypeAlias = pb.HandoffRole.ValueType
State: TypeAlias = pb.HandoffState.ValueType

SOURCE: Final = pb.HANDOFF_ROLE_SOURCE
DESTINATION: Final = pb.HANDOFF_ROLE_DESTINATION

PREPARED: Final = pb.HANDOFF_STATE_PREPARED
TRANSFERRING: Final = pb.HANDOFF_STATE_TRANSFERRING
READY: Final = pb.HANDOFF_STATE_READY
SWITCHING: Final = pb.HANDOFF_STATE_SWITCHING
HELD: Final = pb.HANDOFF_STATE_HELD
RELEASED: Final = pb.HANDOFF_STATE_RELEASED
ACTIVE: Final = pb.HANDOFF_STATE_ACTIVE
FINALIZED: Final = pb.HANDOFF_STATE_FINALIZED
FAILED: Final = pb.HANDOFF_STATE_FAILED
ABORTED: Final = pb.HANDOFF_STATE_ABORTED

STATES: Final[Mapping[Role, tuple[State, ...]]] = {
    SOURCE: (PREPARED, TRANSFERRING, READY, SWITCHING, HELD, RELEASED, FAILED, ABORTED),
    DESTINATION: (PREPARED, ACTIVE, FINALIZED, FAILED, ABORTED),
}
FINAL_STATES: Final[frozenset[State]] = frozenset({RELEASED, FINALIZED, ABORTED})
"""States that nothing leaves."""
COPYING_STATES: Final[frozenset[State]] = frozenset({TRANSFERRING, READY, SWITCHING})
"""States of a source in which QEMU has a migration under way."""


class Call(Enum):
    """What a leader can ask of one side."""

    PREPARE = "Prepare"
    START_TRANSFER = "StartTransfer"
    SWITCH_OVER = "SwitchOver"
    ACTIVATE = "Activate"
    RELEASE = "ReleaseSource"
    FINALIZE = "FinalizeDestination"
    ABORT = "AbortHandoff"
    EVICT = "AbortHandoff of a fenced host"


class Answer(Enum):
    """What to do with a call."""

    PROCEED = "proceed"
    ALREADY = "already"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement on a call; `message` says why it is refused."""

    answer: Answer
    message: str = ""


_PROCEED: Final = Verdict(Answer.PROCEED)
_ALREADY: Final = Verdict(Answer.ALREADY)

_Row: TypeAlias = Mapping[State | None, Verdict]
_Table: TypeAlias = Mapping[Call, _Row]


def _row(*, proceed: tuple[State | None, ...], already: tuple[State, ...]) -> _Row:
    return {**dict.fromkeys(proceed, _PROCEED), **dict.fromkeys(already, _ALREADY)}


# QEMU goes over only when what is left fits the allowed pause, so a SwitchOver that crosses the fall back from READY
# to TRANSFERRING is safe.
_SOURCE: Final[_Table] = {
    Call.PREPARE: _row(proceed=(None,), already=(PREPARED, TRANSFERRING, READY, SWITCHING, HELD, RELEASED, FAILED)),
    Call.START_TRANSFER: _row(proceed=(PREPARED,), already=(TRANSFERRING, READY, SWITCHING, HELD, RELEASED, FAILED)),
    Call.SWITCH_OVER: _row(proceed=(TRANSFERRING, READY), already=(SWITCHING, HELD, RELEASED, FAILED)),
    Call.RELEASE: _row(proceed=(HELD,), already=(RELEASED,)),
    Call.ABORT: _row(proceed=(None, PREPARED, TRANSFERRING, READY, SWITCHING, HELD, FAILED), already=(ABORTED,)),
}
_DESTINATION: Final[_Table] = {
    Call.PREPARE: _row(proceed=(None,), already=(PREPARED, ACTIVE, FINALIZED, FAILED)),
    Call.ACTIVATE: _row(proceed=(PREPARED,), already=(ACTIVE, FINALIZED, FAILED)),
    # A guest that ended right after the commit belongs here all the same, and so does its definition.
    Call.FINALIZE: _row(proceed=(ACTIVE, FAILED), already=(FINALIZED,)),
    Call.ABORT: _row(proceed=(None, PREPARED, FAILED), already=(ABORTED,)),
    # The record says that the guest runs elsewhere, whatever happened here before this host was fenced.
    Call.EVICT: _row(proceed=(None, PREPARED, ACTIVE, FAILED), already=(ABORTED,)),
}
_TABLES: Final[Mapping[Role, _Table]] = {SOURCE: _SOURCE, DESTINATION: _DESTINATION}


def judge(call: Call, role: Role, state: State | None) -> Verdict:
    """Judges a call on a handoff in `state`; None is a handoff that this agent has not heard of."""
    return _TABLES[role].get(call, {}).get(state) or Verdict(Answer.REFUSE, _reason(call, role, state))


def state_name(state: State) -> str:
    """The state's short name, such as "HELD"."""
    return pb.HandoffState.Name(state).removeprefix("HANDOFF_STATE_")


def role_name(role: Role) -> str:
    """The role's short name: "source" or "destination"."""
    return pb.HandoffRole.Name(role).removeprefix("HANDOFF_ROLE_").lower()


def _reason(call: Call, role: Role, state: State | None) -> str:
    side = role_name(role)
    name = "" if state is None else state_name(state)
    match call, state:
        case _, None:
            return f"{call.value}: the {side} has not heard of this handoff; prepare it first"
        case _ if call not in _TABLES[role]:
            return f"{call.value} is not a call to the {side}"
        case _, pb.HANDOFF_STATE_ABORTED:
            return f"{call.value}: this handoff was aborted at the {side} and can't go on; begin a new one"
        case Call.ABORT | Call.EVICT, _:
            return f"{call.value}: the guest runs at the destination (this {side} is {name}); it can only go on"
        case _:
            hint = "; only a HELD copy may be destroyed" if call is Call.RELEASE else ""
            return f"{call.value}: not while the {side} is {name}{hint}"
