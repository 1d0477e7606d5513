"""What an upgrade is planned as, or why it is refused."""

import pytest

from handoff.agent.v1.host_pb2 import Emulator, Host, Slot
from handoff.agent.v1.types_pb2 import Domain
from handoff_common.errors import HandoffError, InvalidArgumentError, NotFoundError, PreconditionError
from handoff_controller.upgrade_planner import COPY, CPR, check_new, choose_build, choose_method, other_slot

NEW = Emulator(name="10.0", release="10.0.2", cpr=True)
REBUILT = Emulator(name="10.0-rebuilt", release="10.0.2", cpr=True)
OLD = Emulator(name="7.2", release="7.2.22")
HOST = Host(
    name="h1", emulators=[NEW, REBUILT, OLD], slots=[Slot(name="a", connected=True), Slot(name="b", connected=True)]
)


@pytest.mark.parametrize(("asked", "build"), [("", NEW), ("10.0-rebuilt", REBUILT), ("7.2", OLD), ("7.2.22", OLD)])
def test_a_build_is_named_by_its_name_or_release(asked: str, build: Emulator) -> None:
    assert choose_build(HOST, asked) == build


@pytest.mark.parametrize(
    ("host", "asked", "kind", "why"),
    [
        (HOST, "9.9", NotFoundError, "it has 10.0 (10.0.2)"),
        (HOST, "10.0.2", InvalidArgumentError, "10.0, 10.0-rebuilt"),
        (Host(name="h1"), "", NotFoundError, "no QEMU build"),
    ],
)
def test_what_names_no_build_is_refused(host: Host, asked: str, kind: type[HandoffError], why: str) -> None:
    with pytest.raises(kind) as refused:
        choose_build(host, asked)
    assert why in refused.value.message


def test_the_build_that_it_has_is_no_upgrade() -> None:
    with pytest.raises(InvalidArgumentError):
        check_new(Domain(name="web", emulator_name="10.0"), NEW)
    check_new(Domain(name="web", emulator_name="10.0"), REBUILT)


def test_it_goes_to_the_other_slot() -> None:
    assert (other_slot(HOST, "a"), other_slot(HOST, "b")) == ("b", "a")


@pytest.mark.parametrize("slots", [[Slot(name="a", connected=True)], [Slot(name="a", connected=True), Slot(name="b")]])
def test_without_another_slot_it_can_not_go(slots: list[Slot]) -> None:
    with pytest.raises(PreconditionError):
        other_slot(Host(name="h1", slots=slots), "a")


def test_memory_is_passed_on_where_both_can() -> None:
    assert choose_method([], NEW)[0] == CPR


@pytest.mark.parametrize(("obstacles", "build"), [([], OLD), (["not shared"], NEW), (["not shared"], OLD)])
def test_memory_is_copied_otherwise_and_the_plan_says_why(obstacles: list[str], build: Emulator) -> None:
    method, why = choose_method(obstacles, build)
    assert method == COPY
    assert all(reason in why for reason in obstacles)
    assert build.cpr or build.name in why
