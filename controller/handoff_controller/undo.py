"""The abort: the guest runs at its source again, and the destination's copy goes."""

from handoff_controller.journey import DESTINATION, SOURCE, Journey, StepFailed

DESTINATION_PATIENCE_S = 30.0


class Undo:
    """The steps of ABORTING."""

    def __init__(self, way: Journey) -> None:
        self._way = way

    async def abort_source(self) -> None:
        """Lets the guest run at the source again. There is no giving up: it may be held there."""
        while True:
            try:
                handoff = await self._way.insist(
                    lambda: self._way.source.abort(
                        self._way.fence, self._way.migration.id, SOURCE, self._way.migration.error
                    ),
                    10.0,
                    also_refusals=True,
                )
            except StepFailed as failure:
                self._way.log.error("the source does not confirm the abort", error=str(failure))
                async with self._way.lock:
                    self._way.warn(
                        f"{self._way.migration.source.host} does not confirm the abort, which goes on: {failure}"
                    )
                    self._way.migration = await self._way.records.save(self._way.migration)
                continue
            outcome = self._way.migration.outcome
            outcome.downtime_ms = handoff.switch_timings.paused_to_resumed_ms
            if handoff.message and handoff.message not in self._way.migration.error:
                self._way.warn(f"{self._way.migration.source.host}: {handoff.message}")
            return

    async def abort_destination(self) -> None:
        """Destroys the destination's copy, now or once its agent is back."""
        try:
            await self._way.insist(
                lambda: self._way.destination.abort(
                    self._way.fence, self._way.migration.id, DESTINATION, self._way.migration.error
                ),
                DESTINATION_PATIENCE_S,
                also_refusals=True,
            )
        except StepFailed as failure:
            self._way.warn(
                f"the copy on {self._way.migration.destination.host} has not been removed: {failure}. "
                "It never ran, and is removed when the host's agent is back"
            )
