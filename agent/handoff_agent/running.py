"""Which QEMU release a running guest really has: its own word, because its file may have been replaced meanwhile."""

import asyncio
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import structlog

from handoff_agent.monitor import Monitor
from handoff_agent.slots import Slot
from handoff_common.errors import DeadlineError, HandoffError

log = structlog.get_logger()

# An inventory waits for an answer no longer than this: a frozen QEMU gives none.
PATIENCE_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Process:
    """One start of a domain. `libvirt_id` is another one after each start."""

    slot: str
    uuid: str
    libvirt_id: int


class RunningReleases:
    """Asks each QEMU once. A guest that has not answered has no release here, and is asked again unless it hangs."""

    def __init__(self) -> None:
        self._known: dict[Process, str] = {}
        self._asking: dict[Process, asyncio.Task[None]] = {}
        # A frozen QEMU keeps a thread of libvirt's and one of ours: never more than one of each.
        self._turns: dict[str, asyncio.Lock] = {}

    def of(self, process: Process) -> str:
        """Its release, such as "10.0.2"; empty when not known (yet)."""
        return self._known.get(process, "")

    async def ask(self, slot: Slot, running: Collection[Process]) -> None:
        """Asks those of `running` (all of `slot`) that are not known; returns after PATIENCE_S at the latest."""
        for process in running:
            if process not in self._known and process not in self._asking:
                self._asking[process] = asyncio.create_task(self._ask(slot, process), name=f"release of {process.uuid}")
        waited_for = [self._asking[process] for process in running if process in self._asking]
        if waited_for:
            await asyncio.wait(waited_for, timeout=PATIENCE_S)

    def keep(self, slot: str, running: Collection[Process]) -> None:
        """Forgets the processes of a slot that are not running any more."""
        for process in [known for known in self._known if known.slot == slot and known not in running]:
            del self._known[process]

    async def close(self) -> None:
        """Ends what is being asked."""
        tasks = tuple(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, slot: Slot, process: Process) -> None:
        try:
            async with self._turns.setdefault(slot.name, asyncio.Lock()):
                numbers = await Monitor(slot, process.uuid).query_release()
            self._known[process] = ".".join(map(str, numbers))
        except DeadlineError as error:
            log.warning("a guest's QEMU does not answer", uuid=process.uuid, slot=slot.name, error=error.message)
            self._known[process] = ""
        except HandoffError as error:
            log.info("a guest's QEMU was not asked", uuid=process.uuid, slot=slot.name, error=error.message)
        finally:
            del self._asking[process]
