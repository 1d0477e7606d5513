"""Seeded bugs that the model has to find: if it does not, it is the model that is wrong."""

import asyncio
import contextlib
from dataclasses import replace

from fake_hosts import Bugs
from plans import Kind, Mutant, Plan, Trouble

from handoff_common.errors import DeadlineError, HandoffError
from handoff_controller.agents import Agent
from handoff_controller.driver import Driver, Work
from handoff_controller.journey import DESTINATION, SOURCE
from handoff_controller.machine import Event, State, state_of


class ForgetsThatTheCommitMayCome(Driver):
    """An unanswered commit is taken for one that failed: the guest is given back to the source at once."""

    async def _advance(self, work: Work) -> None:
        try:
            await super()._advance(work)
        except DeadlineError:
            if state_of(self.migration) is State.SWITCHING:
                await self._give_back()
            raise

    async def _give_back(self) -> None:
        await self._source.abort(self._fence, self.migration.id, SOURCE, "no commit")
        await self._destination.abort(self._fence, self.migration.id, DESTINATION, "no commit")


class AbortsBeforeItIsRecorded(Driver):
    """The source is told to run its guest again first, and the abort recorded afterwards."""

    async def _advance(self, work: Work) -> None:
        if state_of(self.migration) is State.SWITCHING and work.event is Event.FAILED:
            await self._source.abort(self._fence, self.migration.id, SOURCE, work.reason)
        await super()._advance(work)


class ActivatesBeforeTheCommit(Driver):
    """Saves the time of a write to etcd."""

    async def _advance(self, work: Work) -> None:
        if state_of(self.migration) is State.SWITCHING and work.event is Event.COMPLETED:
            destination: Agent = self._destination
            await destination.activate(self._fence, self.migration.id, heard_clock_ms=_now_ms())
        await super()._advance(work)


class ReleasesWithoutProof(Driver):
    """A destination that can't be reached is taken for one that runs the guest."""

    async def _steps(self, state: State) -> Work:
        if state is not State.COMMITTED:
            return await super()._steps(state)
        with contextlib.suppress(HandoffError):
            await self._destination.activate(self._fence, self.migration.id, heard_clock_ms=_now_ms())
        return Work(Event.COMPLETED)


class ReleasesWhatIsPulled(Driver):
    """The held copy is released as soon as the guest runs at the destination."""

    async def _steps(self, state: State) -> Work:
        if state is State.FINISHING:
            with contextlib.suppress(HandoffError):
                await self._source.release_source(self._fence, self.migration.id)
        return await super()._steps(state)


class TakesBackUnfenced(Driver):
    """A destination that can't be reached as it pulls is taken for off."""

    async def _steps(self, state: State) -> Work:
        if state is State.FINISHING:
            try:
                await self._way.see_destination()
            except HandoffError:
                return Work(Event.FENCED, "it is silent")
        return await super()._steps(state)


class TakesBackWhatHasArrived(Driver):
    """A destination that has all disks and is silent then is fenced as before."""

    async def _steps(self, state: State) -> Work:
        work = await super()._steps(state)
        arrived = state is State.FINISHING and self.migration.disks_arrived
        if arrived and any("finalize" in warning for warning in self.migration.warnings):
            return Work(Event.FENCED, "it is silent")
        return work


class ForgetsTheVolumeOfTheAborted(Driver):
    """A destination that never ran keeps its access."""

    async def _steps(self, state: State) -> Work:
        if state is State.ABORTING:
            del self.migration.volumes[:]
        return await super()._steps(state)


AT_THE_COMMIT = 12
IN_THE_PULL = AT_THE_COMMIT + 3

HELD_FOR_LONG = Trouble(AT_THE_COMMIT, Kind.LATE, 0.0, 0.0)
FAST = Plan(pull_s=5.0)
LATE_REVOKE = Plan((Trouble(17, Kind.LATE, 0.0, 3.0),), rounds=2, copy_s=10.0)

# Each with a part of what brings it to light; the search adds the rest.
MUTANTS: dict[str, tuple[Mutant, Plan]] = {
    "a held source that resumes by itself": (Mutant(agents=Bugs(resumes_held_after_s=3.0)), Plan((HELD_FOR_LONG,))),
    "writes without compare-and-swap": (
        Mutant(compares_revisions=False),
        Plan((Trouble(AT_THE_COMMIT, Kind.LATE, 0.0, 3.0),)),
    ),
    "a destination that calls FAILED what it does not know": (
        Mutant(agents=Bugs(fails_when_it_does_not_know=True)),
        Plan((Trouble(AT_THE_COMMIT, Kind.DESTINATION_FREEZES, 0.0, 12.0),)),
    ),
    "an unanswered commit taken for a failed one": (
        Mutant(driver=ForgetsThatTheCommitMayCome),
        Plan((Trouble(AT_THE_COMMIT, Kind.ANSWER_LOST, 0.0, 0.0),)),
    ),
    "an abort before it is recorded": (Mutant(driver=AbortsBeforeItIsRecorded), Plan()),
    "a destination that runs before the commit": (Mutant(driver=ActivatesBeforeTheCommit), Plan()),
    "a destination that obeys an order out of the buffers of a cut link": (
        Mutant(agents=Bugs(obeys_late_orders=True)),
        Plan(
            (
                Trouble(AT_THE_COMMIT + 1, Kind.LATE, 0.0, 12.0),
                Trouble(AT_THE_COMMIT + 2, Kind.DESTINATION_CUT, 0.0, 40.0),
            )
        ),
    ),
    "a fence command that does not fence": (
        Mutant(fences=False),
        Plan((Trouble(AT_THE_COMMIT + 1, Kind.DESTINATION_CUT, 0.003, 40.0),)),
    ),
    "a source released without proof": (Mutant(driver=ReleasesWithoutProof), Plan()),
    "a source released while it is pulled from": (Mutant(driver=ReleasesWhatIsPulled), FAST),
    "a guest taken back from a destination that is only silent": (
        Mutant(driver=TakesBackUnfenced),
        replace(FAST, troubles=(Trouble(IN_THE_PULL, Kind.LOST, 0.0, 0.0),)),
    ),
    "a guest taken back after its disks have arrived": (
        Mutant(driver=TakesBackWhatHasArrived),
        replace(FAST, troubles=(Trouble(IN_THE_PULL + 1, Kind.DESTINATION_CUT, 0.0, 40.0),)),
    ),
    "a fence command that does not fence while disks are pulled": (
        Mutant(fences=False),
        replace(FAST, troubles=(Trouble(IN_THE_PULL, Kind.DESTINATION_CUT, 0.003, 40.0),)),
    ),
    "a storage that takes requests as they arrive": (Mutant(storage_forgets=True), LATE_REVOKE),
    "a volume left to a destination that was aborted": (Mutant(driver=ForgetsTheVolumeOfTheAborted), Plan()),
}


def _now_ms() -> int:
    return int(1000 * asyncio.get_running_loop().time())
