"""The state machine of a migration. Pure: what each state does, and what it becomes.

    PLANNED -> PREPARING -> COPYING -> SWITCHING -> COMMITTED -> FINISHING -> DONE
       |           |           |           |            |           |
       |           +-----------+-----+-----+            |           | only while it pulls disks
       |                             |                  +-----------+
       v                             v                  | only when the destination's copy certainly can't run
    ABORTED <-------------------- ABORTING <------------+

Every step is idempotent: a new leader begins its state's steps again. COMMITTED and ABORTING are both entered by
compare-and-swap on one etcd record, so only one of them can follow SWITCHING.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, StrEnum, auto

from handoff.controller.v1.migrations_pb2 import Migration, MigrationState, StateChange


class State(Enum):
    """MigrationState, as an enum that Python can check."""

    PLANNED = MigrationState.MIGRATION_STATE_PLANNED
    PREPARING = MigrationState.MIGRATION_STATE_PREPARING
    COPYING = MigrationState.MIGRATION_STATE_COPYING
    SWITCHING = MigrationState.MIGRATION_STATE_SWITCHING
    COMMITTED = MigrationState.MIGRATION_STATE_COMMITTED
    FINISHING = MigrationState.MIGRATION_STATE_FINISHING
    DONE = MigrationState.MIGRATION_STATE_DONE
    ABORTING = MigrationState.MIGRATION_STATE_ABORTING
    ABORTED = MigrationState.MIGRATION_STATE_ABORTED


class Step(StrEnum):
    """One idempotent thing to do; most are one call to one agent."""

    AWAIT_ADMISSION = auto()
    PREPARE_SOURCE = auto()
    GRANT_VOLUMES = auto()
    PREPARE_DESTINATION = auto()
    START_TRANSFER = auto()
    AWAIT_READY = auto()
    CONFIRM_DESTINATION = auto()
    SWITCH_OVER = auto()
    AWAIT_HELD = auto()
    ACTIVATE = auto()
    AWAIT_DISKS = auto()
    POINT_PEERS = auto()
    RELEASE_SOURCE = auto()
    FINALIZE_DESTINATION = auto()
    ABORT_SOURCE = auto()
    ABORT_DESTINATION = auto()
    REVOKE_VOLUMES = auto()
    """From the host that does not have the guest in the end."""


class Event(StrEnum):
    """How the work of a state ended."""

    COMPLETED = auto()
    """All steps are done, or, where the state only goes forward, as much as can be done."""
    FAILED = auto()
    """A step failed for good, was cancelled or took too long."""
    FENCED = auto()
    """The destination proved that its copy never ran and is destroyed; or its host is fenced."""


@dataclass(frozen=True, slots=True)
class Phase:
    """What a state does."""

    steps: tuple[Step, ...]
    """In order; at once where `concurrent`."""
    completed: State
    """The next state once the steps are done."""
    failed: State | None
    """The next state when they failed, were cancelled or took too long; None: this state only goes forward."""
    fenced: State | None = None
    """The next state when the destination's copy is proven not to run, now or ever."""
    concurrent: bool = False
    then: tuple[Step, ...] = ()
    """In order, after all of `steps`."""


PHASES: Mapping[State, Phase] = {
    State.PLANNED: Phase((Step.AWAIT_ADMISSION,), completed=State.PREPARING, failed=State.ABORTED),
    State.PREPARING: Phase(
        (Step.PREPARE_SOURCE, Step.GRANT_VOLUMES, Step.PREPARE_DESTINATION),
        completed=State.COPYING,
        failed=State.ABORTING,
    ),
    State.COPYING: Phase((Step.START_TRANSFER, Step.AWAIT_READY), completed=State.SWITCHING, failed=State.ABORTING),
    State.SWITCHING: Phase(
        (Step.CONFIRM_DESTINATION, Step.SWITCH_OVER, Step.AWAIT_HELD),
        completed=State.COMMITTED,
        failed=State.ABORTING,
    ),
    State.COMMITTED: Phase((Step.ACTIVATE,), completed=State.FINISHING, failed=None, fenced=State.ABORTING),
    State.FINISHING: Phase(
        # The source is released once the peers are pointed: until then it sends on what comes for the guest; and once
        # no disk is pulled from it any more.
        (Step.POINT_PEERS, Step.AWAIT_DISKS, Step.FINALIZE_DESTINATION, Step.RELEASE_SOURCE),
        completed=State.DONE,
        failed=None,
        fenced=State.ABORTING,
        concurrent=True,
        then=(Step.REVOKE_VOLUMES,),
    ),
    State.ABORTING: Phase(
        (Step.ABORT_SOURCE, Step.ABORT_DESTINATION),
        completed=State.ABORTED,
        failed=None,
        concurrent=True,
        then=(Step.REVOKE_VOLUMES,),
    ),
}
FINAL = frozenset({State.DONE, State.ABORTED})
CANCELLABLE = frozenset(state for state, phase in PHASES.items() if phase.failed is not None)


def state_of(migration: Migration) -> State:
    """The migration's state. Raises ValueError for one that this release does not know."""
    return State(migration.state)


def is_taken_back(migration: Migration) -> bool:
    """The guest was the destination's, and goes on at the source: what the copy there did does not count any more."""
    is_undone = state_of(migration) in (State.ABORTING, State.ABORTED)
    return is_undone and any(change.state == State.COMMITTED.value for change in migration.timeline)


def next_state(state: State, event: Event) -> State:
    """What `state` becomes. Raises ValueError when the event can't happen in it: a bug, never a fault of the fleet."""
    phase = PHASES[state]
    following = {Event.COMPLETED: phase.completed, Event.FAILED: phase.failed, Event.FENCED: phase.fenced}[event]
    if following is None:
        raise ValueError(f"a migration in {state.name} can't be {event}")
    return following


def enter(migration: Migration, state: State, *, at: datetime, term: int, reason: str = "") -> Migration:
    """A copy of the record in its new state, with a line in its timeline; the final states get their end and total."""
    changed = Migration()
    changed.CopyFrom(migration)
    changed.state = state.value
    change = StateChange(state=state.value, reason=reason, term=term)
    change.time.FromDatetime(at)
    changed.timeline.append(change)
    changed.waiting_for = ""
    changed.needs_decision = ""
    if state in FINAL:
        changed.end_time.FromDatetime(at)
        changed.outcome.total_ms = max(0, changed.end_time.ToMilliseconds() - changed.create_time.ToMilliseconds())
    if state in (State.ABORTING, State.ABORTED) and reason and not changed.error:
        changed.error = reason
    return changed
