"""Short ways to make the messages that these tests are about."""

from datetime import UTC, datetime, timedelta

from handoff.agent.v1.types_pb2 import Domain, DomainState
from handoff.controller.v1.guests_pb2 import Guest
from handoff.controller.v1.migrations_pb2 import Migration, Placement
from handoff_controller.machine import State

EPOCH = datetime(2030, 1, 1, tzinfo=UTC)
UUID = "11111111-2222-3333-4444-555555555555"


def place(host: str, slot: str = "a") -> Placement:
    return Placement(host=host, slot=slot)


def migration(
    migration_id: str = "m1",
    source: str = "h1",
    destination: str = "h2",
    state: State = State.PLANNED,
    *,
    uuid: str = UUID,
    name: str = "web",
    created_s: float = 0,
) -> Migration:
    made = Migration(
        id=migration_id,
        guest_uuid=uuid,
        guest_name=name,
        source=place(source),
        destination=place(destination),
        state=state.value,
    )
    made.create_time.FromDatetime(EPOCH + timedelta(seconds=created_s))
    made.options.downtime_limit_ms = 300
    made.options.timeout.FromSeconds(1800)
    made.options.switch_deadline.FromSeconds(2)
    return made


def guest(owner: str = "h1", *, uuid: str = UUID, name: str = "web", active: str = "") -> Guest:
    return Guest(uuid=uuid, name=name, owner=place(owner), generation=1, active_migration=active)


def domain(
    uuid: str = UUID,
    name: str = "web",
    *,
    state: "DomainState.ValueType" = DomainState.DOMAIN_STATE_RUNNING,
    migration_id: str = "",
    slot: str = "a",
) -> Domain:
    return Domain(uuid=uuid, name=name, slot=slot, state=state, migration_id=migration_id)
