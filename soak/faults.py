"""What can break. Pure: the kinds of fault and their product; inject.py does them."""

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Final, TypeAlias

FREEZE_S: Final = 8.0
"""How long a frozen process stays frozen, and a link that comes back stays cut."""


class Victim(StrEnum):
    """A process that can be killed or frozen."""

    SOURCE_QEMU = "source-qemu"
    DESTINATION_QEMU = "destination-qemu"
    SOURCE_AGENT = "source-agent"
    DESTINATION_AGENT = "destination-agent"
    SOURCE_LIBVIRTD = "source-libvirtd"
    DESTINATION_LIBVIRTD = "destination-libvirtd"
    LEADER = "leader"
    ETCD_FOLLOWER = "etcd-follower"
    ETCD_LEADER = "etcd-leader"


class Blow(StrEnum):
    """What is done to it."""

    KILL = "kill"
    """SIGKILL. Agents and libvirtd are started again a second later, as systemd does; the rest stays dead."""
    FREEZE = "freeze"
    """SIGSTOP for FREEZE_S."""


class Link(StrEnum):
    """A link that can be cut."""

    BETWEEN_HOSTS = "hosts"
    """Between source and destination: streams and tunnels. Others still reach both."""
    TO_SOURCE = "controller-source"
    TO_DESTINATION = "controller-destination"


class Lasting(Enum):
    """For how long."""

    A_WHILE = "a-while"
    """FREEZE_S."""
    FOR_GOOD = "for-good"
    """Until the cell has been judged."""


@dataclass(frozen=True, slots=True)
class Struck:
    """A process is killed or frozen."""

    victim: Victim
    blow: Blow

    @property
    def name(self) -> str:
        """Such as "kill-leader"."""
        return f"{self.blow}-{self.victim}"


@dataclass(frozen=True, slots=True)
class KilledTogether:
    """The destination's QEMU dies, and the leader who would have noticed."""

    victims: tuple[Victim, ...] = (Victim.LEADER, Victim.DESTINATION_QEMU)

    @property
    def name(self) -> str:
        """Such as "kill-leader+destination-qemu"."""
        return f"{Blow.KILL}-{'+'.join(self.victims)}"


@dataclass(frozen=True, slots=True)
class Cut:
    """A link is cut."""

    link: Link
    lasting: Lasting

    @property
    def name(self) -> str:
        """Such as "cut-hosts-for-good"."""
        return f"cut-{self.link}-{self.lasting.value}"


@dataclass(frozen=True, slots=True)
class DiskFull:
    """No room is left on the destination's own disk: the agent's records, libvirt's files, logs."""

    @property
    def name(self) -> str:
        """Its name in tables."""
        return "disk-full-destination"


Fault: TypeAlias = Struck | KilledTogether | Cut | DiskFull

FAULTS: Final[tuple[Fault, ...]] = (
    *(Struck(victim, blow) for blow in Blow for victim in Victim),
    KilledTogether(),
    *(Cut(link, lasting) for lasting in Lasting for link in Link),
    DiskFull(),
)


def is_for_good(fault: Fault) -> bool:
    """Whether it lasts until somebody mends it."""
    return isinstance(fault, DiskFull) or (isinstance(fault, Cut) and fault.lasting is Lasting.FOR_GOOD)
