"""What goes wrong in a run, what is seeded into it, and how it ended."""

from dataclasses import dataclass, field
from enum import Enum, auto

from fake_hosts import Bugs

from handoff_controller.driver import Driver
from handoff_controller.machine import State


class Kind(Enum):
    """What goes wrong at a message, or happens while it is on its way."""

    LOST = auto()
    """It does not arrive, and the sender knows."""
    VANISHED = auto()
    """It does not arrive, and the sender waits for its deadline."""
    ANSWER_LOST = auto()
    """It arrives; the sender waits for its deadline."""
    LATE = auto()
    """As VANISHED, but it arrives `delay_s` after the deadline, whatever has happened meanwhile."""
    REPEATED = auto()
    """It arrives, and once more `delay_s` later. A write to etcd whose answer was lost is sent again by the client."""
    NEW_LEADER = auto()
    """Another controller leads after `delay_s`; the old one does not notice for ZOMBIE_LIFE_S."""
    CANCEL = auto()
    SOURCE_DIES = auto()
    DESTINATION_DIES = auto()
    STREAM_BREAKS = auto()
    SOURCE_CUT = auto()
    """The controllers don't reach the source's agent for `delay_s`."""
    DESTINATION_CUT = auto()
    SOURCE_OFF = auto()
    """Its host loses power: its QEMU is gone, its agent is back after `delay_s`."""
    DESTINATION_OFF = auto()
    SOURCE_FREEZES = auto()
    """Its libvirtd does not answer for `delay_s`."""
    DESTINATION_FREEZES = auto()
    ETCD_CUT = auto()
    DECISION = auto()
    """The operator decides, whether he was asked or not."""


@dataclass(frozen=True)
class Trouble:
    """What happens at the message number `at`. An event happens `after_s` after it was sent."""

    at: int
    kind: Kind
    after_s: float
    delay_s: float


@dataclass(frozen=True)
class Operator:
    """Looks at the record, and decides `after_s` after a decision is needed: for the source, or the destination."""

    after_s: float = 5.0
    to_source: bool = True
    by_hand: bool = False
    """Turns the silent host off himself and says so, instead of having the controllers fence it."""
    only_cuts: bool = False
    """As `by_hand`, but where the copy does not run the host is only cut off for a while."""

    def pulls_the_plug(self, state: State) -> bool:
        """Whether the silent destination is turned off by hand before he decides."""
        return self.by_hand and self.to_source and state in (State.COMMITTED, State.FINISHING)


@dataclass(frozen=True)
class Plan:
    """One run. `copy_s`: how long the memory takes; `timeout_s`: the migration's own deadline.

    `pull_s`: how long a disk is pulled after the switch; 0: all of them are network volumes.
    `operator`: what is done when a decision is needed.
    `rounds`: how many migrations of the guest, one after the other, each away from where it is by then.
    """

    troubles: tuple[Trouble, ...] = ()
    copy_s: float = 1.0
    timeout_s: int = 1800
    rounds: int = 1
    operator: Operator = field(default_factory=Operator)
    pull_s: float = 0.0


@dataclass(frozen=True)
class Mutant:
    """Seeded bugs; none in the good system."""

    agents: Bugs = field(default_factory=Bugs)
    compares_revisions: bool = True
    compares_leader: bool = True
    driver: type[Driver] = Driver
    storage_forgets: bool = False
    """It carries out what comes late."""
    fences: bool = True
    """False: the fence command says that the host is off, and does nothing."""


@dataclass(frozen=True)
class Verdict:
    """How a run ended."""

    violations: tuple[str, ...]
    state: State | None
    messages: int
    error: str = ""
    timeline: tuple[str, ...] = ()
