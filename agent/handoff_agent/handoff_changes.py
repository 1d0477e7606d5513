"""Tells whoever listens that a handoff changed its state."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class HandoffChanges:
    """Hands migration ids to listeners, on the asyncio loop. A listener that lags gets each id once."""

    def __init__(self) -> None:
        self._listeners: set[asyncio.Queue[str]] = set()

    def publish(self, migration_id: str) -> None:
        """Tells all listeners that this migration's handoff changed here."""
        for queue in self._listeners:
            queue.put_nowait(migration_id)

    @contextmanager
    def listen(self) -> Iterator[asyncio.Queue[str]]:
        """Gives a queue of the ids to come, for as long as the context lasts."""
        queue: asyncio.Queue[str] = asyncio.Queue()
        self._listeners.add(queue)
        try:
            yield queue
        finally:
            self._listeners.discard(queue)
