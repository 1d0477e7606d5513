"""The disks of every guest that comes or leaves, as companions of its handoff."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from handoff_agent.companions import DestinationCompanion, SourceCompanion
from handoff_agent.disks.destination import ArrivingDisks
from handoff_agent.disks.settings import StorageSettings
from handoff_agent.disks.source import DepartingDisks
from handoff_agent.handoff import Handoff
from handoff_agent.slots import Slot


class DiskCompanions:
    """Says that disks go with guests. Those of a guest that stays on its host need nothing: their plan is empty."""

    def __init__(self, settings: StorageSettings, threads: ThreadPoolExecutor, slots: Sequence[Slot]) -> None:
        """`slots`: all of the host."""
        self._settings = settings
        self._threads = threads
        self._slots = slots

    def of_source(self, handoff: Handoff, slot: Slot) -> Sequence[SourceCompanion]:
        """For a guest that leaves."""
        return (DepartingDisks(handoff, slot, self._settings, self._threads, self._slots),)

    def of_destination(self, handoff: Handoff, slot: Slot) -> Sequence[DestinationCompanion]:
        """For a guest that comes."""
        return (ArrivingDisks(handoff, slot, self._settings, self._threads),)
