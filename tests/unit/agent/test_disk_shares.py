"""How connections share one rate."""

from hypothesis import given
from hypothesis import strategies as st

from handoff_agent.disks.shares import (
    CATCH_UP,
    IDLE,
    MOMENT_S,
    Use,
    catching_up,
    credit_bytes,
    even_shares,
    shares,
)

MIB = 1 << 20
TICK_S = 0.1

RATES = st.integers(1 * MIB, 4096 * MIB)
# Of each disk: ticks of data and of zeros, in turn.
STRETCHES = st.lists(st.integers(1, 12), min_size=1, max_size=12)


def sent_by(stretches: list[list[int]], rate: int, ticks: int) -> tuple[list[list[float]], list[list[int]]]:
    """What each disk has sent in each tick, and might have; a disk that has data sends all that it may."""
    has_data = [[n % 2 == 0 for n, length in enumerate(disk) for _ in range(length)] for disk in stretches]
    given_out = even_shares(rate, len(stretches))
    sent, allowed, credit = [], [], 0.0
    for tick in range(ticks):
        now = [
            share * TICK_S if data[tick % len(data)] else 0.0 for share, data in zip(given_out, has_data, strict=True)
        ]
        sent.append(now)
        allowed.append(given_out)
        uses = [Use(share, bytes_ / TICK_S) for share, bytes_ in zip(given_out, now, strict=True)]
        credit = credit_bytes(rate, credit, int(sum(now)), TICK_S)
        given_out = shares(catching_up(rate, credit, TICK_S), uses)
    return sent, allowed


@given(st.lists(STRETCHES, min_size=1, max_size=6), RATES)
def test_the_rate_holds_over_any_time_whatever_the_disks_contain(stretches: list[list[int]], rate: int) -> None:
    sent, allowed = sent_by(stretches, rate, 60)
    totals = [sum(tick) for tick in sent]
    for length in (1, 2, 10, 20):
        most = rate * min(length * TICK_S + MOMENT_S, (1 + CATCH_UP) * length * TICK_S)
        assert all(sum(totals[n : n + length]) <= most + length for n in range(len(totals) - length))
    least = (1 - CATCH_UP) * IDLE * (rate // len(stretches)) - 1
    assert all(share >= least for tick in allowed for share in tick)


@given(st.integers(2, 6), RATES)
def test_what_one_does_not_use_the_others_have(disks: int, rate: int) -> None:
    sent, _ = sent_by([[1000], *([[0, 1000]] * (disks - 1))], rate, 10)
    kept = IDLE * (disks - 1) / disks
    assert sum(sent[-1]) >= (1 - kept) * rate * TICK_S - disks


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(0, 64)), min_size=1, max_size=6), RATES)
def test_shares_are_the_rate_at_the_most(uses: list[tuple[int, int]], rate: int) -> None:
    given_out = shares(rate, [Use(share * MIB, sent * MIB) for share, sent in uses])
    assert sum(given_out) <= rate
    assert all(share > 0 for share in given_out)


def test_what_all_leave_unused_for_a_moment_is_made_good() -> None:
    sent, _ = sent_by([[4, 1] * 20], 64 * MIB, 100)
    assert sum(map(sum, sent)) > 0.83 * 100 * TICK_S * 64 * MIB
    rate, half_a_tick = 1000 * MIB, credit_bytes(1000 * MIB, 0, 50 * MIB, TICK_S)
    assert catching_up(rate, half_a_tick, TICK_S) == 1.05 * rate
    assert catching_up(rate, credit_bytes(rate, 0, 101 * MIB, TICK_S), TICK_S) == 990 * MIB


def test_one_that_gets_data_again_has_an_even_share_a_tick_later() -> None:
    waiting = shares(64 * MIB, [Use(32 * MIB, 32 * MIB), Use(32 * MIB, 0)])
    assert waiting == [60 * MIB, 4 * MIB]
    assert shares(64 * MIB, [Use(share, share) for share in waiting]) == [32 * MIB, 32 * MIB]
