import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handoff_agent.convergence import (
    LARGEST_RESERVE_BYTES,
    LONGEST_POLL_S,
    SHORTEST_POLL_S,
    SMALLEST_RESERVE_BYTES,
    Action,
    ConvergenceSettings,
    Sample,
    decide,
    expected_downtime_ms,
    next_look_s,
    reserve_bytes,
)

MIB = 1 << 20
SETTINGS = ConvergenceSettings(downtime_limit_ms=300)
FIRST_PASS = Sample(
    elapsed_s=2.0,
    pass_elapsed_s=2.0,
    ram_total_bytes=1024 * MIB,
    ram_transferred_bytes=200 * MIB,
    ram_remaining_bytes=800 * MIB,
    throughput_bytes_per_s=100 * MIB,
    dirty_bytes_per_s=0,
    iterations=1,
)


def sample(**changes):
    return dataclasses.replace(FIRST_PASS, **changes)


def action(**changes):
    return decide([sample(**changes)], SETTINGS).action


def test_the_middle_of_a_pass_is_not_ready():
    assert action() is Action.CONTINUE


def test_the_end_of_a_pass_of_a_quiet_guest_is_ready():
    assert action(ram_remaining_bytes=4 * MIB) is Action.READY


def test_a_guest_that_dirties_faster_than_the_link_is_never_ready():
    busy = {"dirty_bytes_per_s": 150 * MIB, "iterations": 9, "pass_elapsed_s": 1.0}
    assert action(ram_remaining_bytes=0, **busy) is Action.CONTINUE
    assert "allowed" in decide([sample(ram_remaining_bytes=0, **busy)], SETTINGS).reason


def test_a_busy_guest_gets_ready_once_its_passes_are_short():
    assert action(ram_remaining_bytes=MIB, dirty_bytes_per_s=50 * MIB, iterations=5, pass_elapsed_s=0.2) is Action.READY


def test_throttling_is_told():
    reason = decide(
        [sample(ram_remaining_bytes=0, dirty_bytes_per_s=150 * MIB, pass_elapsed_s=4.0, cpu_throttle_percent=80)],
        SETTINGS,
    ).reason
    assert "slowed by 80 %" in reason


def test_without_a_rate_nothing_is_decided():
    unknown = sample(throughput_bytes_per_s=0, ram_transferred_bytes=0, ram_remaining_bytes=0)
    assert expected_downtime_ms(unknown) is None
    assert decide([unknown], SETTINGS).action is Action.CONTINUE


def test_the_mean_rate_stands_in_until_qemu_has_one():
    assert sample(throughput_bytes_per_s=0).rate_bytes_per_s == 100 * MIB


@pytest.mark.parametrize(
    ("rate_mib", "expected"),
    [(1, SMALLEST_RESERVE_BYTES), (100, 10 * MIB), (10_000, LARGEST_RESERVE_BYTES)],
)
def test_the_reserve_follows_the_link(rate_mib, expected):
    assert reserve_bytes(sample(throughput_bytes_per_s=rate_mib * MIB), SETTINGS) == pytest.approx(expected)


samples = st.builds(
    Sample,
    elapsed_s=st.floats(0, 1e5),
    pass_elapsed_s=st.floats(0, 1e5),
    ram_total_bytes=st.integers(1, 1 << 44),
    ram_transferred_bytes=st.integers(0, 1 << 50),
    ram_remaining_bytes=st.integers(0, 1 << 44),
    throughput_bytes_per_s=st.integers(0, 1 << 40),
    dirty_bytes_per_s=st.integers(0, 1 << 40),
    iterations=st.integers(0, 10_000),
    cpu_throttle_percent=st.integers(0, 99),
)


@given(samples, st.integers(1, 10_000))
def test_ready_means_that_the_pause_fits(reading, limit_ms):
    decision = decide([reading], ConvergenceSettings(limit_ms))
    downtime_ms = expected_downtime_ms(reading)
    assert decision.reason
    if decision.action is Action.READY:
        assert downtime_ms is not None
        assert downtime_ms <= limit_ms


@given(samples, st.integers(1, 10_000))
def test_the_next_look_is_in_bounds(reading, limit_ms):
    assert SHORTEST_POLL_S <= next_look_s(reading, ConvergenceSettings(limit_ms)) <= LONGEST_POLL_S
