"""Plans the disks of a guest that wants to come, by what is on this host now."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from handoff.agent.v1 import disk_pb2 as pb
from handoff_agent.disks import images
from handoff_agent.disks.plan import Place, Site, lacks_only_space, paths_here, plan, refusal
from handoff_agent.disks.space import Promise
from handoff_common.errors import DeadlineError

# A folder may be on a network file system that hangs.
LOOK_TIMEOUT_S: Final = 5.0


class DiskPlans:
    """The planner with what it needs to know of this host."""

    def __init__(
        self, host: str, host_type: str, place: Place, threads: ThreadPoolExecutor, *, tls: bool = False
    ) -> None:
        """`tls`: disks come by TLS only."""
        self._host = host
        self._host_type = host_type
        self._place = place
        self._threads = threads
        self._tls = tls

    async def plan(
        self, guest: str, disks: Sequence[pb.DiskFacts], *, fast: bool, promises: Sequence[Promise] = ()
    ) -> tuple[pb.DiskMove, ...]:
        """The plan for all disks of a guest. `promises`: the space of disks that are on their way.

        Raises PreconditionError or ExhaustedError with every reason why one can't come, and DeadlineError when this
        host's storage does not answer.
        """
        paths = paths_here(disks, self._place, fast=fast)
        if not paths:
            promises = ()  # nothing is asked of storage that only others use
        looked_at = (*paths, *(promise.path for promise in promises))
        looking = asyncio.get_running_loop().run_in_executor(self._threads, images.look, looked_at)
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                found = await looking
        except TimeoutError:
            raise DeadlineError(
                f"host {self._host}: the storage of {', '.join(looked_at)} did not answer within {LOOK_TIMEOUT_S:g} s"
            ) from None
        site = Site(self._host, self._host_type, self._place, found, promises, tls=self._tls)
        moves = plan(disks, site, fast=fast)
        refused = refusal(guest, moves, only_space=lacks_only_space(disks, site, fast=fast))
        if refused is not None:
            raise refused
        return moves
