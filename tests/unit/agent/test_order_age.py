import pytest

from handoff_agent.order_age import ORDER_LIFE_MS, check_age, clock_ms
from handoff_common.errors import PreconditionError
from handoff_controller.journey import ORDER_LIFE_S


def test_an_order_by_a_leader_that_has_just_heard_from_us_is_obeyed() -> None:
    now = clock_ms()
    check_age(now, now)
    check_age(now - ORDER_LIFE_MS, now)


@pytest.mark.parametrize("age_ms", [ORDER_LIFE_MS + 1, -1, 10**9], ids=["old", "of before a boot", "without a word"])
def test_one_that_may_be_out_of_date_is_refused(age_ms: int) -> None:
    with pytest.raises(PreconditionError, match="may be out of date"):
        check_age(10**9 - age_ms, 10**9)


def test_who_takes_a_silent_hosts_guest_away_waits_for_as_long() -> None:
    assert ORDER_LIFE_S * 1000 >= ORDER_LIFE_MS
