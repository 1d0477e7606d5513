"""One look at a rollout: the records in, the record as it should be and what to begin out. Pure.

    RUNNING --a guest failed, cancel--> STOPPING --nothing under way--> FAILED | CANCELLED
       +--------------no guest left----------------------------------> DONE | FAILED

The id of a guest's upgrade follows from the rollout's, and is in the record before the upgrade is created. So a new
leader creates the same upgrade again, which creates nothing, and goes on from there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from handoff.agent.v1.types_pb2 import DomainState
from handoff.controller.v1.guests_pb2 import Guest
from handoff.controller.v1.migrations_pb2 import Migration
from handoff.controller.v1.rollouts_pb2 import Rollout, RolloutGuest, RolloutGuestState, RolloutState
from handoff_controller.machine import State, state_of


class Phase(Enum):
    """RolloutState, as an enum that Python can check."""

    RUNNING = RolloutState.ROLLOUT_STATE_RUNNING
    STOPPING = RolloutState.ROLLOUT_STATE_STOPPING
    DONE = RolloutState.ROLLOUT_STATE_DONE
    FAILED = RolloutState.ROLLOUT_STATE_FAILED
    CANCELLED = RolloutState.ROLLOUT_STATE_CANCELLED


class Turn(Enum):
    """RolloutGuestState, as an enum that Python can check."""

    PENDING = RolloutGuestState.ROLLOUT_GUEST_STATE_PENDING
    UPGRADING = RolloutGuestState.ROLLOUT_GUEST_STATE_UPGRADING
    UPGRADED = RolloutGuestState.ROLLOUT_GUEST_STATE_UPGRADED
    SKIPPED = RolloutGuestState.ROLLOUT_GUEST_STATE_SKIPPED
    FAILED = RolloutGuestState.ROLLOUT_GUEST_STATE_FAILED


FINAL = frozenset({Phase.DONE, Phase.FAILED, Phase.CANCELLED})


@dataclass(frozen=True, slots=True)
class Look:
    """What the records say. `upgrades`: those of the rollout that exist, by id; `guests`: by UUID, with `domain`.

    `unrecorded`: UUIDs of guests that the host runs, by its agent's word, before the records know of them.
    """

    upgrades: Mapping[str, Migration]
    guests: Mapping[str, Guest]
    unrecorded: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Decision:
    """The record as it should be, and which of its guests' upgrades are to be created once it is written."""

    rollout: Rollout
    create: tuple[str, ...]
    """Ids of upgrades."""


def phase_of(rollout: Rollout) -> Phase:
    """The rollout's state. Raises ValueError for one that this release does not know."""
    return Phase(rollout.state)


def turn_of(guest: RolloutGuest) -> Turn:
    """The guest's state. Raises ValueError for one that this release does not know."""
    return Turn(guest.state)


def upgrade_id(rollout_id: str, number: int) -> str:
    """The id of the upgrade of the guest with that place in the rollout, counted from 1."""
    return f"{rollout_id}-g{number}"


def decide(rollout: Rollout, look: Look, *, at: datetime) -> Decision:
    """What follows from how things are now. A final rollout stays as it is."""
    changed = _copy(rollout)
    if phase_of(changed) in FINAL:
        return Decision(changed, ())
    for guest in changed.guests:
        if turn_of(guest) is Turn.UPGRADING:
            _follow(guest, look.upgrades.get(guest.migration_id))
    _stop_if_need_be(changed)
    if phase_of(changed) is Phase.RUNNING:
        _give_turns(changed, look)
    else:
        _take_back(changed, look)
    _end_if_nothing_is_left(changed, at)
    missing = [guest.migration_id for guest in _in(changed, Turn.UPGRADING) if guest.migration_id not in look.upgrades]
    return Decision(changed, tuple(missing))


def refused(rollout: Rollout, migration_id: str, turn: Turn, reason: str) -> Rollout:
    """The record after an upgrade was not created. With UPGRADING it is tried again."""
    changed = _copy(rollout)
    for guest in changed.guests:
        if guest.migration_id == migration_id and turn_of(guest) is Turn.UPGRADING:
            _turn(guest, turn, reason)
    return changed


def _follow(guest: RolloutGuest, upgrade: Migration | None) -> None:
    if upgrade is None:
        return
    match state_of(upgrade):
        case State.DONE if upgrade.HasField("loss"):
            _turn(guest, Turn.FAILED, upgrade.loss.reason)
        case State.DONE:
            _turn(guest, Turn.UPGRADED, "; ".join(upgrade.warnings))
        case State.ABORTED:
            _turn(guest, Turn.FAILED, upgrade.error)
        case _:
            guest.reason = upgrade.needs_decision or upgrade.waiting_for


def _stop_if_need_be(rollout: Rollout) -> None:
    if phase_of(rollout) is not Phase.RUNNING:
        return
    failed = _in(rollout, Turn.FAILED)
    if rollout.cancel_requested:
        rollout.state = Phase.STOPPING.value
        rollout.reason = "cancelled by the operator"
    elif failed and not rollout.keep_going:
        rollout.state = Phase.STOPPING.value
        rollout.reason = f"{failed[0].name} failed: {failed[0].reason}"


def _give_turns(rollout: Rollout, look: Look) -> None:
    free = rollout.parallel - len(_in(rollout, Turn.UPGRADING))
    for number, guest in enumerate(rollout.guests, start=1):
        if free <= 0:
            return
        if turn_of(guest) is not Turn.PENDING:
            continue
        record = look.guests.get(guest.uuid)
        if record is None and guest.uuid in look.unrecorded:
            guest.reason = "waits until it is in the records"
        elif (nothing_to_do := _nothing_to_do(rollout, record)) is not None:
            _turn(guest, Turn.SKIPPED, nothing_to_do)
        elif record is not None and record.active_migration:
            guest.reason = f"waits for migration {record.active_migration}, which has it now"
        else:
            _turn(guest, Turn.UPGRADING)
            guest.migration_id = upgrade_id(rollout.id, number)
            free -= 1


def _nothing_to_do(rollout: Rollout, record: Guest | None) -> str | None:
    """Why a guest whose turn has come is passed over; None when it has to be upgraded."""
    if record is None or record.owner.host != rollout.host:
        where = f"now on {record.owner.host}" if record is not None else "gone"
        return f"not on {rollout.host} any more: {where}"
    if record.active_migration or not record.HasField("domain"):
        return None
    if record.domain.state == DomainState.DOMAIN_STATE_SHUT_OFF:
        return "not running"
    if record.domain.emulator_name == rollout.release:
        return f"runs under {rollout.release} already"
    return None


def _take_back(rollout: Rollout, look: Look) -> None:
    """Upgrades that were to be created, and were not, are not begun any more."""
    for guest in _in(rollout, Turn.UPGRADING):
        if guest.migration_id not in look.upgrades:
            _turn(guest, Turn.PENDING)
            guest.migration_id = ""


def _end_if_nothing_is_left(rollout: Rollout, at: datetime) -> None:
    if _in(rollout, Turn.UPGRADING) or (phase_of(rollout) is Phase.RUNNING and _in(rollout, Turn.PENDING)):
        return
    failed = _in(rollout, Turn.FAILED)
    if failed:
        rollout.state = Phase.FAILED.value
        rollout.reason = rollout.reason or f"{len(failed)} of {len(rollout.guests)} guests failed"
    elif rollout.cancel_requested and _in(rollout, Turn.PENDING):
        rollout.state = Phase.CANCELLED.value
    else:
        rollout.state = Phase.DONE.value
        rollout.reason = ""
    rollout.end_time.FromDatetime(at)


def upgrades_of(rollout: Rollout, migrations: Iterable[Migration]) -> Mapping[str, Migration]:
    """Those of the migrations that are its guests' upgrades, by id."""
    ids = {guest.migration_id for guest in rollout.guests if guest.migration_id}
    return {migration.id: migration for migration in migrations if migration.id in ids}


def _in(rollout: Rollout, turn: Turn) -> list[RolloutGuest]:
    return [guest for guest in rollout.guests if turn_of(guest) is turn]


def _turn(guest: RolloutGuest, turn: Turn, reason: str = "") -> None:
    guest.state = turn.value
    guest.reason = reason


def _copy(rollout: Rollout) -> Rollout:
    changed = Rollout()
    changed.CopyFrom(rollout)
    return changed
