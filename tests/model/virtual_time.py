"""An event loop whose clock leaps to the next timer: patience, deadlines and backoffs cost nothing."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Self, TypeVar

Result = TypeVar("Result")

EPOCH = datetime(2030, 1, 1, tzinfo=UTC)


class StuckError(Exception):
    """Nothing is ready and no timer is set: this loop would wait for ever."""


class _LeapingSelector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise StuckError
        self.now_s += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Tells virtual time, in seconds from 0. For code that waits for timers, tasks and events only."""

    def __init__(self) -> None:
        self._leaping = _LeapingSelector()
        super().__init__(self._leaping)

    def time(self) -> float:
        return self._leaping.now_s


class VirtualDatetime(datetime):
    """`datetime` whose now() follows the running VirtualLoop; put it in place of the name in a module under test."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        at = EPOCH + timedelta(seconds=asyncio.get_running_loop().time())
        return cls.fromtimestamp(at.timestamp(), tz)


def run(main: Callable[[], Coroutine[object, object, Result]]) -> Result:
    """Runs a coroutine to its end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main())
