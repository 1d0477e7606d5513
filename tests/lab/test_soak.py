"""A part of the fault matrix that has every state and every fault in it; `make soak` runs all of it."""

from collections.abc import AsyncIterator, Iterator

import pytest
from labs import end_lab, new_lab

from handoff_lab.fleet import Fleet
from soak.cells import Cell, matrix, subset
from soak.stage import Stage

pytestmark = [pytest.mark.lab, pytest.mark.timeout(180)]

SEED = 1
CELLS = 25


@pytest.fixture(scope="module")
def soaked() -> Iterator[Fleet]:
    lab = new_lab()
    try:
        yield Fleet(lab)
    finally:
        end_lab(lab)


@pytest.fixture(scope="module")
async def stage(soaked: Fleet) -> AsyncIterator[Stage]:
    async with Stage(soaked) as found:
        yield found


@pytest.mark.parametrize("cell", subset(matrix(), CELLS, SEED), ids=lambda cell: cell.name)
async def test_the_guest_runs_once_and_the_record_is_true(stage: Stage, cell: Cell) -> None:
    result = await stage.run(cell)
    assert result.ok, "\n".join(result.problems)
