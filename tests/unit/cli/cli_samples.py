"""Messages as a real fleet has them."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from handoff.agent.v1.host_pb2 import Emulator, Slot
from handoff.agent.v1.host_pb2 import Host as AgentHost
from handoff.agent.v1.qemu_pb2 import TransferProgress
from handoff.agent.v1.types_pb2 import Domain, DomainState
from handoff.controller.v1.guests_pb2 import Guest
from handoff.controller.v1.hosts_pb2 import Host, HostState
from handoff.controller.v1.migrations_pb2 import Migration, MigrationState, Placement
from handoff.controller.v1.rollouts_pb2 import Rollout, RolloutGuestState, RolloutState

GIB = 1 << 30
MIB = 1 << 20
START = datetime(2026, 3, 14, 9, 26, 53, 589000, UTC)

PLANNED = MigrationState.MIGRATION_STATE_PLANNED
PREPARING = MigrationState.MIGRATION_STATE_PREPARING
COPYING = MigrationState.MIGRATION_STATE_COPYING
SWITCHING = MigrationState.MIGRATION_STATE_SWITCHING
COMMITTED = MigrationState.MIGRATION_STATE_COMMITTED
FINISHING = MigrationState.MIGRATION_STATE_FINISHING
DONE = MigrationState.MIGRATION_STATE_DONE
ABORTING = MigrationState.MIGRATION_STATE_ABORTING
ABORTED = MigrationState.MIGRATION_STATE_ABORTED

ROLLOUT_RUNNING = RolloutState.ROLLOUT_STATE_RUNNING
ROLLOUT_STOPPING = RolloutState.ROLLOUT_STATE_STOPPING
PENDING = RolloutGuestState.ROLLOUT_GUEST_STATE_PENDING
UPGRADING = RolloutGuestState.ROLLOUT_GUEST_STATE_UPGRADING
UPGRADED = RolloutGuestState.ROLLOUT_GUEST_STATE_UPGRADED
FAILED = RolloutGuestState.ROLLOUT_GUEST_STATE_FAILED

WHOLE_WAY = (PLANNED, PREPARING, COPYING, SWITCHING, COMMITTED, FINISHING, DONE)
UNDONE = (PLANNED, PREPARING, COPYING, ABORTING, ABORTED)
# When each state of a whole move was entered, in ms after the first.
ENTERED_MS = (0, 12, 1890, 14234, 14301, 14330, 15612)


def a_migration(states: Sequence["MigrationState.ValueType"] = WHOLE_WAY, **fields: object) -> Migration:
    """A migration that has been through these states."""
    migration = Migration(
        id="20260314-092653-5d3a",
        guest_uuid="6f1c2d5e-8a41-4e59-9d17-2f0b7c1a9e33",
        guest_name="web-1",
        source=Placement(host="h1", slot="a"),
        destination=Placement(host="h2", slot="a"),
        state=states[-1],
        revision=100 + len(states),
    )
    migration.create_time.FromDatetime(START)
    migration.options.downtime_limit_ms = 300
    migration.options.switch_deadline.FromTimedelta(timedelta(seconds=2))
    migration.options.timeout.FromTimedelta(timedelta(minutes=30))
    for state, entered_ms in zip(states, ENTERED_MS, strict=False):
        change = migration.timeline.add(state=state, term=7)
        change.time.FromDatetime(START + timedelta(milliseconds=entered_ms))
    if states[-1] in (DONE, ABORTED):
        migration.end_time.CopyFrom(migration.timeline[-1].time)
        migration.outcome.total_ms = ENTERED_MS[len(states) - 1]
    if states[-1] == DONE:
        outcome = migration.outcome
        outcome.downtime_ms = 84.2
        outcome.paused_to_held_ms = 58.9
        outcome.held_to_committed_ms = 9.1
        outcome.committed_to_running_ms = 16.2
        outcome.qemu_downtime_ms = 55
        outcome.ram_bytes = 1432 * MIB
        outcome.iterations = 4
    if states[-1] in (ABORTING, ABORTED):
        migration.error = "cancelled by the operator while COPYING"
        migration.cancel_requested = True
        migration.timeline[min(3, len(states) - 1)].reason = migration.error
    migration.MergeFrom(Migration(**fields))
    return migration


def copying(part: float, second: int = 3) -> Migration:
    """One that has copied this part of its memory, this many seconds after its start."""
    progress = TransferProgress(
        ram_total_bytes=GIB,
        ram_transferred_bytes=round(part * GIB),
        ram_remaining_bytes=round((1 - part) * GIB),
        throughput_bytes_per_s=112 * MIB,
        dirty_bytes_per_s=21 * MIB,
        iterations=2,
        cpu_throttle_percent=20,
        expected_downtime_ms=1400,
        elapsed_ms=1000 * second,
        decision="throttle to 20 %: at this rate the rest does not fit into 300 ms",
    )
    progress.time.FromDatetime(START + timedelta(seconds=second))
    return a_migration((PLANNED, PREPARING, COPYING), progress=progress)


def a_host(name: str = "h1", state: "HostState.ValueType" = HostState.HOST_STATE_UP, **fields: object) -> Host:
    """A host of the fleet."""
    detail = AgentHost(
        name=name,
        slots=[
            Slot(name="a", connected=True, libvirt_version="9.0.0"),
            Slot(name="b", connected=True, libvirt_version="9.0.0"),
        ],
        emulators=[
            Emulator(path="/usr/bin/qemu-system-x86_64", release="7.2.22", name="debian"),
            Emulator(path="/opt/qemu-10.0/bin/qemu-system-x86_64", release="10.0.2", name="current"),
        ],
        memory_bytes=64 * GIB,
        memory_free_bytes=23 * GIB,
        cpus=32,
    )
    host = Host(name=name, agent_address=f"{name}.example.net:7701", state=state, guests=3, detail=detail)
    host.seen_time.FromDatetime(START)
    host.MergeFrom(Host(**fields))
    return host


def a_guest(name: str = "web-1", host: str = "h1", **fields: object) -> Guest:
    """A guest of the fleet."""
    guest = Guest(
        uuid="6f1c2d5e-8a41-4e59-9d17-2f0b7c1a9e33",
        name=name,
        owner=Placement(host=host, slot="a"),
        generation=3,
        domain=Domain(
            name=name,
            state=DomainState.DOMAIN_STATE_RUNNING,
            memory_bytes=4 * GIB,
            vcpus=2,
            qemu_release="10.0.2",
        ),
    )
    guest.MergeFrom(Guest(**fields))
    return guest


def a_rollout(
    guests: Sequence["RolloutGuestState.ValueType"] = (UPGRADED, UPGRADING, PENDING), **fields: object
) -> Rollout:
    """A rollout whose guests, db-1, web-1 and [x], are in these states."""
    rollout = Rollout(
        id="20260314-093106-77aa",
        host="h1",
        release="10.0-rebuilt",
        parallel=2,
        state=ROLLOUT_RUNNING,
        revision=1 + sum(guests),
    )
    rollout.create_time.FromDatetime(START)
    for number, (name, state) in enumerate(zip(("db-1", "web-1", "[x]"), guests, strict=True), start=1):
        migration_id = "" if state == PENDING else f"{rollout.id}-g{number}"
        rollout.guests.add(uuid=name, name=name, state=state, migration_id=migration_id)
    rollout.MergeFrom(Rollout(**fields))
    return rollout
