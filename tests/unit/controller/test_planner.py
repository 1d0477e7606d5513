from datetime import timedelta

import pytest
from records import EPOCH

from handoff.agent.v1.disk_pb2 import DiskMove, DiskStrategy
from handoff.controller.v1.migrations_pb2 import MigrationOptions
from handoff_common.errors import InvalidArgumentError
from handoff_controller.planner import new_migration_id, time_for_disks, with_defaults


def options(
    downtime_ms: int = 0, deadline_s: float | None = None, timeout_s: float | None = None, bandwidth: int = 0
) -> MigrationOptions:
    made = MigrationOptions(downtime_limit_ms=downtime_ms, bandwidth_bytes_per_s=bandwidth)
    if deadline_s is not None:
        made.switch_deadline.FromTimedelta(timedelta(seconds=deadline_s))
    if timeout_s is not None:
        made.timeout.FromTimedelta(timedelta(seconds=timeout_s))
    return made


def test_every_default_is_filled_in() -> None:
    full = with_defaults(MigrationOptions())

    assert full == options(300, 2, 1800)


def test_the_switch_gets_twice_the_allowed_pause() -> None:
    assert with_defaults(options(5000)).switch_deadline.seconds == 10


def test_what_is_given_stays_and_the_request_is_not_changed() -> None:
    given = options(500, 3, 60, 1 << 20)

    assert with_defaults(given) == given
    with_defaults(request := MigrationOptions())
    assert request == MigrationOptions()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (options(2_000_001), "downtime limit 2000001 ms: QEMU takes 2000000 at most"),
        (options(300, 0.3), "switch deadline 0.3 s must be longer"),
        (options(300, 0), "switch deadline 0 s must be longer"),
        (options(300, -1), "switch deadline -1 s must be longer"),
        (options(timeout_s=0), "timeout must be longer than 0 s"),
        (options(timeout_s=-5), "timeout must be longer than 0 s"),
        (options(bandwidth=1), "bandwidth 1 bytes/s is less than 1 MiB/s"),
        (options(bandwidth=(1 << 20) - 1), "no guest would ever arrive"),
    ],
)
def test_what_can_not_be_meant_is_refused(wrong: MigrationOptions, told: str) -> None:
    with pytest.raises(InvalidArgumentError, match=told):
        with_defaults(wrong)


@pytest.mark.parametrize(("mib_per_s", "expected_s"), [(0, 3200), (8, 12800), (1000, 3200)])
def test_disks_that_are_copied_first_get_their_time(mib_per_s: int, expected_s: int) -> None:
    copied = DiskMove(strategy=DiskStrategy.DISK_STRATEGY_COPY, bytes_to_send=100 << 30)
    pulled = DiskMove(strategy=DiskStrategy.DISK_STRATEGY_PULL, bytes_to_send=9 << 40)
    assert time_for_disks([copied, pulled], mib_per_s << 20).total_seconds() == expected_s


def test_ids_sort_by_creation() -> None:
    ids = [new_migration_id(EPOCH + timedelta(seconds=second)) for second in (0, 1, 59, 3600, 90_000)]

    assert ids == sorted(ids)
    assert ids[0].startswith("20300101-000000-")
