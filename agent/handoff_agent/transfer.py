"""What the handoff of the source and its ways of transfer have in common: who asks what of whom."""

from typing import Final, Protocol

from handoff.agent.v1 import qemu_pb2 as pb
from handoff_agent.ledger import Record
from handoff_agent.monitor import MigrationInfo
from handoff_agent.stream import Connection

READY_POLL_S: Final = 0.5
ORDERED_POLL_S: Final = 0.005
GATED_POLL_S: Final = 0.02


class Switch(Protocol):
    """The handoff, as its way of transfer sees it."""

    record: Record
    progress: pb.TransferProgress | None

    @property
    def ordered_at(self) -> float:
        """When the switch was ordered, by the monotonic clock; 0 when it was not."""

    @property
    def is_paused(self) -> bool:
        """QEMU has paused the guest and waits, or goes on to the end by itself."""

    async def say_ready(self, *, ready: bool) -> None:
        """READY, or TRANSFERRING again."""

    async def before_stop(self) -> bool:
        """Does what comes right before the guest is stopped. False: don't stop it, the switch is broken off."""

    def stopping(self) -> None:
        """The guest is being paused now: its deadline counts from here."""

    def not_stopped(self) -> None:
        """It was not paused after all."""

    def may_continue(self) -> bool:
        """All that must follow the pause has been done. Look again when it has not."""

    def break_off(self, reason: str) -> None:
        """Gives the transfer up: the guest runs on."""


class Transfer(Protocol):
    """One way to bring the guest's state to the other QEMU. All methods raise as Monitor.execute does."""

    async def begin(self, uri: str) -> Connection | None:
        """QEMU sends on return, over this connection if it can be cut. Raises as Stream.connect does as well."""

    async def look(self, info: MigrationInfo) -> float:
        """Judges a reading taken while the guest runs; returns when to take the next, in seconds."""

    async def go(self) -> None:
        """Does what is still missing of an ordered switch; is called until the guest is held."""
