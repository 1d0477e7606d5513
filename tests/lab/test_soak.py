"""A part of the fault matrix that has every state and every fault in it; `make soak` runs all of it."""

from collections.abc import AsyncIterator, Mapping

import pytest
from labs import end_lab, new_lab

from handoff_lab.fleet import Fleet
from soak.cell_run import Result
from soak.cells import Cell, matrix, subset
from soak.stage import Stage

# The first test waits for all cells: they run in two lanes.
pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]

SEED = 1
CELLS = subset(matrix(), 25, SEED)


@pytest.fixture(scope="module")
async def results() -> AsyncIterator[Mapping[str, Result]]:
    lab = new_lab()
    found: dict[str, Result] = {}
    try:
        async with Stage(Fleet(lab)) as stage:
            await stage.run(CELLS, lambda result: found.update({result.cell: result}), lambda: True)
        yield found
    finally:
        end_lab(lab)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_the_guest_runs_once_and_the_record_is_true(results: Mapping[str, Result], cell: Cell) -> None:
    result = results[cell.name]
    assert result.ok, "\n".join([*result.problems, result.story])
