"""The guest as a whole: its copies, its data, who may open its volume, and what must never happen to them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from handoff.controller.v1.migrations_pb2 import Migration
from handoff_controller.decisions import is_pulled
from handoff_controller.machine import State, state_of

UUID = "11111111-2222-3333-4444-555555555555"
NAME = "web"


class Copy(Enum):
    """One QEMU process of the guest."""

    GONE = auto()
    LISTENING = auto()
    """Waits for the memory of another one."""
    PAUSED = auto()
    """Complete and resumable."""
    RUNNING = auto()


@dataclass
class Guest:
    """It has a network volume, and a local disk. `record` is the migration in the store; None before there is one."""

    record: Callable[[], Migration | None]
    copies: dict[str, Copy]
    whole: set[str]
    """Hosts with images of the local disk that need nothing else."""
    admitted: set[str]
    """Hosts that may open the volume."""
    revisions: dict[str, int] = field(default_factory=dict)
    """For each host the last request about that, as the storage knows it."""
    lacking: set[str] = field(default_factory=set)
    """Hosts with images that need those of the other host."""
    violations: list[str] = field(default_factory=list)
    killed: set[str] = field(default_factory=set)
    """Hosts whose QEMU died by itself."""
    told_to_run: set[str] = field(default_factory=set)
    """Destinations whose copy ran or may have run."""

    def recorded(self) -> State | None:
        migration = self.record()
        return None if migration is None else state_of(migration)

    def set(self, host: str, copy: Copy) -> None:
        self.copies[host] = copy
        if copy is Copy.RUNNING:
            if host not in self.admitted:
                self.violations.append(f"{host} runs the guest and may not open its volume")
            if host in self.lacking and not self.whole:
                self.violations.append(f"{host} runs the guest on images that lack what they are backed by")
        if sum(one is Copy.RUNNING for one in self.copies.values()) > 1:
            self.violations.append(f"two copies run while the record says {self.recorded()}")

    def expect_record(self, what: str, *states: State) -> None:
        if self.recorded() not in states:
            self.violations.append(f"{what} while the record says {self.recorded()}")

    def expect_arrived(self, what: str) -> None:
        """All that follows from a disk that has arrived comes after the record of it."""
        migration = self.record()
        if migration is not None and is_pulled(migration):
            self.violations.append(f"{what} while disks are pulled, by the record")

    def is_whole_at(self, host: str) -> None:
        self.lacking.discard(host)
        self.whole.add(host)

    def remove_images(self, host: str) -> None:
        """With a fast migration only: otherwise the local disk is of no interest here."""
        if not self.lacking and len(self.whole) < 2:
            return
        self.lacking.discard(host)
        self.whole.discard(host)
        if not self.whole:
            self.violations.append(f"{host} removed the only images that were whole")

    def shut_out(self, host: str) -> None:
        self.admitted.discard(host)
        if self.copies[host] is Copy.RUNNING:
            self.violations.append(f"{host} was shut out of the volume of a guest that it runs")
