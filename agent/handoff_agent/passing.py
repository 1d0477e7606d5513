"""The memory is passed on by descriptor to another QEMU of this host, whose side of the handoff is in this agent.

begin     migrate: the descriptors are sent       [setup]
look      the new QEMU has started                         READY
go        the new QEMU is told to listen
          STOP event, the devices are sent        [active], [completed]
"""

from collections.abc import Callable
from typing import Protocol

from handoff_agent.local_sockets import CPR
from handoff_agent.monitor import MigrationInfo
from handoff_agent.outgoing import OutgoingMigration
from handoff_agent.rules import TRANSFERRING
from handoff_agent.transfer import GATED_POLL_S, READY_POLL_S, Switch
from handoff_common.errors import HandoffError


class Receiver(Protocol):
    """The destination's side, where it is in the same agent."""

    async def is_started(self) -> bool:
        """Its QEMU has the memory and answers. Raises HandoffError when it has ended instead."""

    async def accept(self) -> None:
        """Lets its QEMU take the devices' state: the source's QEMU pauses the guest at once."""


class Passing:
    """The passing on of one guest's memory."""

    def __init__(self, switch: Switch, migration: OutgoingMigration, receiver: Callable[[], Receiver]) -> None:
        """`receiver` raises NotFoundError when the destination's side is not in this agent."""
        self._switch = switch
        self._migration = migration
        self._receiver = receiver
        self._accepted = False

    async def begin(self, uri: str) -> None:
        """Sends the descriptors to "cpr:…"."""
        await self._migration.pass_on(uri.removeprefix(CPR))

    async def look(self, info: MigrationInfo) -> float:
        """Asks whether the new QEMU has started."""
        if self._switch.record.state != TRANSFERRING:
            return READY_POLL_S
        try:
            started = await self._receiver().is_started()
        except HandoffError as error:
            self._switch.break_off(f"the new QEMU did not start: {error.message}")
            return GATED_POLL_S
        if started:
            await self._switch.say_ready(ready=True)
        return GATED_POLL_S

    async def go(self) -> None:
        """Lets the new QEMU take the guest; the old one pauses it then."""
        if self._accepted:
            return
        self._accepted = True
        if not await self._switch.before_stop():
            return
        try:
            await self._receiver().accept()
        except HandoffError as error:
            self._switch.break_off(f"the new QEMU does not take the guest: {error.message}")
