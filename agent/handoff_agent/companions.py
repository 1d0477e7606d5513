"""What goes with a guest beside its memory: disks, switch ports. Each hooks into a handoff as a companion.

    source                                          destination
    leaving()    PrepareSource
                                                    prepare(xml)    before the domain is created
                                                    created()       it exists, paused; its taps are plugged
    begin()      StartTransfer, before `migrate`
    ordered()    SwitchOver, the guest still runs
    pausing()    the guest is about to be stopped
    paused()     it has stopped                     (QEMU loads what the source's sends)
                 HELD
                                                    before_run()    Activate, before the resume
                                                    running()       the guest runs here
    released()   the held copy is destroyed         finalize()      the guest stays
    back()       instead of HELD, or after it       undo()          the domain is destroyed

Every method may be called again, by this life of the agent or the next, and even if the one before was not: an agent
that was restarted knows only the record. A companion reads what it was asked for in its handoff's `record`, which
changes meanwhile. Errors are HandoffError with a sentence that names the guest and says what to do.
"""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from typing import Protocol, TypeAlias

import structlog

from handoff_agent.handoff import Handoff
from handoff_agent.slots import Slot
from handoff_common.errors import HandoffError

Work: TypeAlias = Coroutine[object, object, None]


class SourceCompanion:
    """One thing that leaves with a guest."""

    async def leaving(self) -> None:
        """The guest will leave: makes what the destination needs before its domain is created.

        A failure is the handoff's; `back` follows with the abort.
        """

    async def begin(self) -> None:
        """Starts what takes its time, and returns when the memory may follow; a failure is the handoff's.

        Is cancelled by an abort (`back` follows) and at the agent's end (`begin` follows, in its next life).
        """

    async def ordered(self) -> None:
        """Does what makes the pause shorter. The order waits for it, and a failure is the handoff's."""

    async def pausing(self) -> None:
        """The guest still runs, and is stopped when this returns. Be very quick: `paused` follows, and may do the same.

        Not called where QEMU stops the guest by itself. A failure breaks the switch off.
        """

    async def paused(self) -> None:
        """The guest has stopped: it won't be HELD, nor what is left of it be sent, before this returns. Be quick.

        Runs while QEMU sends the last of the memory. With memory that is passed on QEMU does not wait for it. A failure
        breaks the switch off; so does the switch's deadline, which cancels it.
        """

    async def held_again(self) -> None:
        """An agent that was restarted finds the guest HELD: what the destination still needs is there again soon."""

    async def back(self) -> None:
        """The guest runs here, or is about to: turns everything back. The guest waits for it for a moment only.

        Is called as soon as the switch is broken off, when QEMU runs the guest, and by every abort, whatever happened
        before. A failure leaves the abort undone, to be repeated by the leader; the guest runs meanwhile.
        """

    async def released(self) -> None:
        """The held copy is destroyed, and undefined. A failure leaves the release undone, to be repeated."""

    async def detach(self) -> None:
        """The agent ends: so does all that it does itself; the next one's `held_again` or `begin` goes on with it."""


class DestinationCompanion:
    """One thing that comes with a guest."""

    async def prepare(self, xml: str) -> str:
        """Makes what the domain needs before it is created; returns the XML to create it with."""
        return xml

    async def created(self) -> None:
        """The domain exists, paused, and its taps are plugged. A failure is the handoff's."""

    async def before_run(self) -> None:
        """The guest is about to run here. Be quick. A failure means that it does not: the source gets it back."""

    async def running(self) -> None:
        """The guest runs here. A failure is logged; it is called again before `finalize`."""

    async def finalize(self) -> None:
        """The guest stays. A failure leaves this undone, to be repeated by the leader."""

    async def undo(self) -> None:
        """The domain is destroyed: leaves nothing behind. A failure leaves the abort undone, to be repeated."""

    async def detach(self) -> None:
        """The agent ends: so does all that it does itself; the next one's `running` goes on with it."""


class Companions(Protocol):
    """Says what goes with a guest."""

    def of_source(self, handoff: Handoff, slot: Slot) -> Sequence[SourceCompanion]:
        """For a guest that leaves `slot`."""

    def of_destination(self, handoff: Handoff, slot: Slot) -> Sequence[DestinationCompanion]:
        """For a guest that comes to `slot`."""


class NoCompanions:
    """Memory only."""

    def of_source(self, handoff: Handoff, slot: Slot) -> Sequence[SourceCompanion]:
        """None."""
        return ()

    def of_destination(self, handoff: Handoff, slot: Slot) -> Sequence[DestinationCompanion]:
        """None."""
        return ()


class AllCompanions:
    """Those of several parts of the agent."""

    def __init__(self, *parts: Companions) -> None:
        self._parts = parts

    def of_source(self, handoff: Handoff, slot: Slot) -> Sequence[SourceCompanion]:
        """All of theirs."""
        return [companion for part in self._parts for companion in part.of_source(handoff, slot)]

    def of_destination(self, handoff: Handoff, slot: Slot) -> Sequence[DestinationCompanion]:
        """All of theirs."""
        return [companion for part in self._parts for companion in part.of_destination(handoff, slot)]


async def together(work: Iterable[Work]) -> None:
    """Does it all at once. The first failure is raised, after the rest was cancelled."""
    tasks = [asyncio.create_task(_as_told(each)) for each in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def each(work: Iterable[Work], log: structlog.typing.FilteringBoundLogger) -> None:
    """Does it all at once, whatever fails; failures are logged, and the first is raised in the end."""
    results = await asyncio.gather(*map(_as_told, work), return_exceptions=True)
    failures = [result for result in results if isinstance(result, BaseException)]
    for failure in failures:
        log.warning("companion", error=str(failure))
    if failures:
        raise failures[0]


async def _as_told(work: Work) -> None:
    """A bug in a companion is no reason to leave a guest paused: it fails as any other failure."""
    try:
        await work
    except HandoffError:
        raise
    except Exception as error:
        raise HandoffError(f"{type(error).__name__}: {error}; this is a bug in the agent") from error
