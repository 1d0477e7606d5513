"""Independent steps side by side; bringing a fleet up is mostly waiting."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
WORKERS = 16


def in_parallel(steps: Sequence[Callable[[], Result]]) -> list[Result]:
    """Runs every step to its end and returns the results in order. Raises the first error after all have ended."""
    if not steps:
        return []
    with ThreadPoolExecutor(max_workers=min(WORKERS, len(steps))) as pool:
        futures = [pool.submit(step) for step in steps]
    return [future.result() for future in futures]
