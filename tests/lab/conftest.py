"""A fleet of three hosts for the whole session, and small labs of their own for tests that break theirs."""

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from moves import Moves, Subject

from handoff_lab.fleet import Fleet
from handoff_lab.guest import Guests
from handoff_lab.state import DEFAULT_PREFIX, Lab


def _new_lab() -> Lab:
    # A directory of its own: a lab that a developer has up is left alone.
    prefix = Path(os.environ.get("HANDOFF_PREFIX") or DEFAULT_PREFIX)
    return Lab(Path(tempfile.mkdtemp(prefix="hl-", dir="/var/tmp")), prefix)


def _end(lab: Lab) -> None:
    keep = os.environ.get("HANDOFF_TEST_LOGS")
    if keep and lab.directory.exists():
        shutil.copytree(
            lab.directory,
            Path(keep) / lab.directory.name,
            ignore=lambda directory, names: [n for n in names if not _is_log(Path(directory) / n)],
        )
    Fleet(lab).down()


def _is_log(path: Path) -> bool:
    return path.is_dir() or path.suffix in {".log", ".console", ".toml"}


@pytest.fixture(scope="session")
def fleet() -> Iterator[Fleet]:
    """Three hosts, two controllers, one etcd: with agents and controllers."""
    lab = _new_lab()
    try:
        fleet = Fleet(lab)
        fleet.up(hosts=3, controllers=2, etcd=1)
        yield fleet
    finally:
        _end(lab)


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
    lab = _new_lab()
    try:
        yield Fleet(lab)
    finally:
        _end(lab)


@pytest.fixture(scope="session")
async def moves(fleet: Fleet) -> AsyncIterator[Moves]:
    """The session's fleet as clients of its controllers see it."""
    async with Moves(fleet) as found:
        yield found


@pytest.fixture
async def subject(moves: Moves, guests: Guests) -> Subject:
    """A guest on h1 that the test may move. A new one each time: what one test did to it is no other test's matter."""
    return await Subject.create(moves, "mover", "h1")
