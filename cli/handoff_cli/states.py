"""Names of the API's enums as people see them, and which states are final."""

from google.protobuf.descriptor import EnumDescriptor

from handoff.agent.v1.types_pb2 import DomainState
from handoff.controller.v1.hosts_pb2 import HostState
from handoff.controller.v1.migrations_pb2 import Migration, MigrationState
from handoff.controller.v1.rollouts_pb2 import Rollout, RolloutGuestState, RolloutState

DONE = MigrationState.MIGRATION_STATE_DONE
ABORTED = MigrationState.MIGRATION_STATE_ABORTED
FINAL = frozenset({DONE, ABORTED})
ENDED = frozenset(
    {
        RolloutState.ROLLOUT_STATE_DONE,
        RolloutState.ROLLOUT_STATE_FAILED,
        RolloutState.ROLLOUT_STATE_CANCELLED,
    }
)


def is_final(migration: Migration) -> bool:
    """Whether nothing changes any more."""
    return migration.state in FINAL


def migration_state(state: int) -> str:
    """ "COPYING"; the bare number of a state that only a newer controller knows."""
    return _short(MigrationState.DESCRIPTOR, state)


def is_ended(rollout: Rollout) -> bool:
    """Whether nothing changes any more."""
    return rollout.state in ENDED


def rollout_state(state: int) -> str:
    """ "RUNNING"; the bare number of a state that only a newer controller knows."""
    return _short(RolloutState.DESCRIPTOR, state)


def rollout_guest_state(state: int) -> str:
    """ "upgraded"."""
    return _short(RolloutGuestState.DESCRIPTOR, state).lower()


def host_state(state: int) -> str:
    """ "UP"; "UNKNOWN" before the leader has looked at it."""
    return "UNKNOWN" if state == HostState.HOST_STATE_UNSPECIFIED else _short(HostState.DESCRIPTOR, state)


def domain_state(state: int) -> str:
    """ "running"; "unknown" when its host has not reported it."""
    if state == DomainState.DOMAIN_STATE_UNSPECIFIED:
        return "unknown"
    return _short(DomainState.DESCRIPTOR, state).lower().replace("_", " ")


def _short(kind: EnumDescriptor, state: int) -> str:
    value = kind.values_by_number.get(state)
    if value is None:
        return str(state)
    unspecified: str = kind.values_by_number[0].name
    return str(value.name).removeprefix(unspecified.removesuffix("UNSPECIFIED"))
