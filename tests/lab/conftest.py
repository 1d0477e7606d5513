"""A fleet of three hosts for the whole session, and small labs of their own for tests that break theirs."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest
from labs import end_lab, new_lab
from moves import Moves, Subject

from handoff_lab.fleet import Fleet
from handoff_lab.gateway import NAME as GATEWAY
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


@dataclass
class Shelf:
    """The guest that one test leaves to the next, so that not every test boots its own."""

    kept: Subject | None = None


@pytest.fixture(scope="module")
def shelf(fleet: Fleet) -> Iterator[Shelf]:
    """Empty at a module's start, and emptied at its end."""
    found = Shelf()
    yield found
    if found.kept is not None:
        Guests(fleet).delete(found.kept.name)


@pytest.fixture
def guests(fleet: Fleet, shelf: Shelf, request: pytest.FixtureRequest) -> Iterator[Guests]:
    """Guests of the session's fleet; those that a test creates are removed after it."""
    found = Guests(fleet)
    if shelf.kept is not None and "subject" not in request.fixturenames:
        found.delete(shelf.kept.name)
        shelf.kept = None
    yield found
    kept = shelf.kept.name if shelf.kept is not None else None
    for guest in fleet.lab.guests():
        if guest.name != kept:
            found.delete(guest.name)
    left = [seen for seen in found.domains() if seen.guest != kept]
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
async def subject(moves: Moves, guests: Guests, shelf: Shelf) -> AsyncIterator[Subject]:
    """A guest on h1 or h2 that the test may move: the one of the test before where that left it as new."""
    found = shelf.kept or await Subject.create(moves, "mover", "h1")
    shelf.kept = None
    yield found
    if await found.is_as_new():
        shelf.kept = found


@pytest.fixture
async def tenant(moves: Moves, guests: Guests, fleet: Fleet) -> Subject:
    """A guest of tenant red on h1."""
    # It learns by itself, and knows the guest's MAC from the guests of other tests, on other hosts.
    await asyncio.to_thread(fleet.node(GATEWAY).run, ["ip", "neigh", "flush", "dev", RED.interface])
    return await Subject.create(moves, "red-1", "h1", disks=(), network=RED.name)
