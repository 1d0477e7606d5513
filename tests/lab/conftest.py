"""A fleet of three hosts for the whole session, and small labs of their own for tests that break theirs."""

from collections.abc import AsyncIterator, Iterator

import pytest
from labs import end_lab, new_lab
from moves import Moves, Subject

from handoff_lab.fleet import Fleet
from handoff_lab.guest import Guests
from handoff_lab.networks import RED


@pytest.fixture(scope="session")
def fleet() -> Iterator[Fleet]:
    """Three hosts, two controllers, one etcd: with agents and controllers."""
    lab = new_lab()
    try:
        fleet = Fleet(lab)
        fleet.up(hosts=3, controllers=2, etcd=1)
        yield fleet
    finally:
        end_lab(lab)


@pytest.fixture
def guests(fleet: Fleet) -> Iterator[Guests]:
    """Guests of the session's fleet; those that a test creates are removed after it."""
    found = Guests(fleet)
    yield found
    for guest in fleet.lab.guests():
        found.delete(guest.name)
    left = found.domains()
    assert not left, f"the test left domains behind: {left}"


@pytest.fixture
def spare() -> Iterator[Fleet]:
    """A lab of its own that is not up yet."""
    lab = new_lab()
    try:
        yield Fleet(lab)
    finally:
        end_lab(lab)


@pytest.fixture(scope="session")
async def moves(fleet: Fleet) -> AsyncIterator[Moves]:
    """The session's fleet as clients of its controllers see it."""
    async with Moves(fleet) as found:
        yield found


@pytest.fixture
async def subject(moves: Moves, guests: Guests) -> Subject:
    """A guest on h1 that the test may move. A new one each time: what one test did to it is no other test's matter."""
    return await Subject.create(moves, "mover", "h1")


@pytest.fixture
async def tenant(moves: Moves, guests: Guests) -> Subject:
    """A guest of tenant red on h1."""
    return await Subject.create(moves, "red-1", "h1", disks=(), network=RED.name)
