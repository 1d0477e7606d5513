"""The real agent, killed at a write of its ledger, or at a work on disks: `mortal_agent.py CONFIG`.

It begins when a line comes in.

The file `dies-at` in its state_dir names the write, such as "source HELD.1 before": the first record of a source that
is HELD, before it is on disk. It is gone when the agent dies, so the next life goes on.

Before: everything is done that does not wait for this write, as on a slow disk, and then the agent dies without it.
After: it dies as soon as the record is on disk.

Works on disks are named in the same way, such as "destination image-named.1 before"; see WORKS.

With "fails-then" there, its next life can't do what follows a guest's pause, as one without its bridge.

What is written is logged in `writes` there, a line each: migration, side, state and how many in a row.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest

from handoff_agent import main as agent
from handoff_agent.companions import AllCompanions, NoCompanions, SourceCompanion
from handoff_agent.disks import images
from handoff_agent.disks.storage_daemon import StorageDaemon
from handoff_agent.emulators import Emulators
from handoff_agent.handoff import Handoff
from handoff_agent.ledger import Ledger, Record
from handoff_agent.rules import role_name, state_name
from handoff_agent.settings import AgentSettings
from handoff_agent.slots import Slot
from handoff_common.config import load_settings
from handoff_common.errors import UnavailableError

# Longer than anything takes that is done meanwhile: orders to QEMU, and what a leader does that hears too early.
SLOW_DISK_S = 0.3
WORKS: Mapping[str, tuple[object, str]] = {
    "image-made": (images, "create"),
    "image-filled": (images, "_fill"),
    "image-named": (images, "give_name"),
    "image-discarded": (images, "remove_marked"),
    "image-removed": (images, "remove"),
    "exports-begun": (StorageDaemon, "_start"),
    "exports-ended": (StorageDaemon, "_stop"),
}
"""Functions by what they have done when they return."""

P = ParamSpec("P")
T = TypeVar("T")


class MortalLedger(Ledger):
    """Looks at each write whether it is the last."""

    def __init__(self, state_dir: Path) -> None:
        super().__init__(state_dir)
        self._state_dir = state_dir
        self._last: dict[tuple[str, str], tuple[str, int]] = {}

    def save(self, record: Record) -> None:
        write = self._name(record)
        fated = fate(self._state_dir)
        if fated == f"{write} before":
            time.sleep(SLOW_DISK_S)
            die(self._state_dir)
        super().save(record)
        if fated == f"{write} after":
            die(self._state_dir)
        with (self._state_dir / "writes").open("a") as writes:
            writes.write(f"{record.migration_id} {write}\n")

    def _name(self, record: Record) -> str:
        side, state = role_name(record.role), state_name(record.state)
        before, count = self._last.get((record.migration_id, side), ("", 0))
        count = count + 1 if before == state else 1
        self._last[record.migration_id, side] = state, count
        return f"{side} {state}.{count}"


def mortal(folder: Path, name: str, work: Callable[P, T]) -> Callable[P, T]:
    """Looks at each time that this work is done whether it is the last; counts from when the fate is known."""
    done: dict[str, int] = {}

    def do(*args: P.args, **kwargs: P.kwargs) -> T:
        goal, _, moment = fate(folder).rpartition(" ")
        kind, _, number = goal.partition(" ")[2].partition(".")
        if kind == name:
            done[goal] = done.get(goal, 0) + 1
        is_last = kind == name and done[goal] == int(number)
        if is_last and moment == "before":
            die(folder)
        result = work(*args, **kwargs)
        if is_last:
            die(folder)
        return result

    return do


def fate(folder: Path) -> str:
    """Where it dies; empty: nowhere."""
    try:
        return (folder / "dies-at").read_text()
    except FileNotFoundError:
        return ""


def die(folder: Path) -> None:
    (folder / "dies-at").unlink()
    with contextlib.suppress(FileNotFoundError):
        (folder / "fails-then").rename(folder / "fails")
    os.kill(os.getpid(), signal.SIGKILL)


class Bridge(SourceCompanion):
    """Can't be told anything while there is a file `fails`."""

    def __init__(self, fails: Path) -> None:
        self._fails = fails

    async def paused(self) -> None:
        if self._fails.exists():
            raise UnavailableError("no bridge")


class Bridges(NoCompanions):
    """One for each guest that leaves."""

    def __init__(self, fails: Path) -> None:
        self._fails = fails

    def of_source(self, handoff: Handoff, slot: Slot) -> Sequence[SourceCompanion]:
        return [Bridge(self._fails)]


def main(config: Path) -> None:
    settings = load_settings(config, AgentSettings)
    # A life begins at once: the QEMU builds are looked at before.
    emulators = Emulators(settings.emulators)
    asyncio.run(emulators.probe())
    if not sys.stdin.readline():
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent, "Ledger", MortalLedger)
        patch.setattr(agent, "Emulators", lambda *_: emulators)
        for name, (owner, function) in WORKS.items():
            patch.setattr(owner, function, mortal(settings.state_dir, name, getattr(owner, function)))
        bridges = Bridges(settings.state_dir / "fails")
        patch.setattr(agent, "AllCompanions", lambda *parts: AllCompanions(bridges, *parts))
        agent.main(["--config", str(config)])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
