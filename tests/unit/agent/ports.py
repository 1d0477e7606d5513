"""Ports that no other test run at the same time uses."""

import os

_FIRST, _EACH = 20000, 128


def port(number: int) -> int:
    """One of this worker's 128, below those that the kernel gives to connections."""
    assert 0 <= number < _EACH
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return _FIRST + _EACH * worker + number
