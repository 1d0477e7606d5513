"""What goes over a host's overlay link, by its interface's own counter."""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from handoff_lab.node import Node

INTERFACE = "ovl0"
INTERVAL_S = 0.05
# Of all bytes: the middle of a transfer, without its beginning and end.
MIDDLE = (0.1, 0.9)


@dataclass(frozen=True, slots=True)
class Sample:
    """The counter at a moment of time.monotonic()."""

    at_s: float
    sent_bytes: int


class Wire:
    """Counts what a host sends while the block lasts."""

    def __init__(self, node: Node) -> None:
        self._counters = Path(f"/proc/{node.require_pid()}/net/dev")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="wire", daemon=True)
        self._samples: list[Sample] = []

    def __enter__(self) -> Self:
        self._samples = [self._read()]
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._samples.append(self._read())

    @property
    def sent_bytes(self) -> int:
        """All that was sent."""
        return self._samples[-1].sent_bytes - self._samples[0].sent_bytes

    def middle_bytes_per_s(self, first_bytes: int = 0) -> float:
        """Rate in the middle of the first so many bytes, or of all; 0 when that took less than two samples."""
        middle = self._part(*MIDDLE, first_bytes)
        return _rate(middle[0], middle[-1]) if len(middle) > 1 else 0.0

    def most_bytes_per_s(self, over_s: float = 1.0) -> float:
        """The largest rate over such a time, until the end of the middle; 0 when it took less."""
        samples = self._part(0, MIDDLE[1])
        starts = enumerate(samples)
        spans = ((one, next((to for to in samples[n:] if to.at_s >= one.at_s + over_s), None)) for n, one in starts)
        return max((_rate(one, to) for one, to in spans if to is not None), default=0.0)

    def _part(self, begin: float, end: float, of_bytes: int = 0) -> list[Sample]:
        """The samples between two parts of so many bytes, or of all."""
        first, total = self._samples[0].sent_bytes, of_bytes or self.sent_bytes
        low, high = (first + part * total for part in (begin, end))
        return [sample for sample in self._samples if low <= sample.sent_bytes <= high]

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._samples.append(self._read())

    def _read(self) -> Sample:
        for line in self._counters.read_text().splitlines():
            name, _, fields = line.partition(":")
            if name.strip() == INTERFACE:
                return Sample(time.monotonic(), int(fields.split()[8]))
        raise OSError(f"no {INTERFACE} in {self._counters}")


def _rate(one: Sample, another: Sample) -> float:
    return (another.sent_bytes - one.sent_bytes) / (another.at_s - one.at_s)
