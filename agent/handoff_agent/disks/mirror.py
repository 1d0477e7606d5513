"""The mirror of one disk into an export of another host, over QMP; mechanism only.

    connect    blockdev-add (nbd); with TLS, object-add before
    begin      blockdev-mirror                               [running]
                                                             [ready]: each write goes to both
    complete   block-job-cancel, without force               [concluded]
    cancel     block-job-cancel, with force; yank where the link is dead

libvirt knows nothing of it: it ignores jobs and nodes that it did not make. A job stays known after its end until it is
dismissed, so an agent that was away learns how it ended.
"""

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

from handoff_agent.disks.nodes import Executes
from handoff_agent.disks.uris import ExportUri
from handoff_agent.monitor import Json, QmpError
from handoff_common.errors import DeadlineError, HandoffError, PreconditionError

COMPLETE_POLL_S: Final = 0.002
CANCEL_POLL_S: Final = 0.02
# After this a connection that does not let the job end is cut.
YANK_AFTER_S: Final = 1.0
# The guest does not run while QEMU connects; without a bound that is the kernel's, two minutes. QEMU tries again until
# then, whatever the reason: a wrong certificate stops the guest as long. Less would not survive a SYN that is lost.
OPEN_TIMEOUT_S: Final = 2
CANCEL_TIMEOUT_S: Final = 8.0
_CONCLUDED: Final = ("concluded", "null")


@dataclass(frozen=True, slots=True)
class JobInfo:
    """One reading of the job."""

    done_bytes: int
    total_bytes: int
    ready: bool
    concluded: bool
    error: str
    synced: bool | None
    """Both sides have the same bytes, and will: each write goes to both. None for QEMU before 8.2, which won't tell."""


def parse_job(job: Mapping[str, Json]) -> JobInfo:
    """Reads a BlockJobInfo."""
    synced = job.get("actively-synced")
    return JobInfo(
        done_bytes=int(cast(int, job.get("offset", 0))),
        total_bytes=int(cast(int, job.get("len", 0))),
        ready=bool(job.get("ready")),
        concluded=str(job.get("status")) in _CONCLUDED,
        error=str(job.get("error", "")),
        synced=None if synced is None else bool(synced),
    )


class Mirror:
    """One disk's mirror in one QEMU, whether or not it has begun. All methods raise as `execute` does."""

    def __init__(self, monitor: Executes, target: str, *, tls_credentials: str = "") -> None:
        """`target`: the disk's device in the guest.

        `tls_credentials`: folder with x509 credentials for its export, which QEMU can read; empty: no TLS.
        """
        self.target = target
        self._tls_credentials = tls_credentials
        self._tls_object = f"handoff-tls-{target}"
        self._monitor = monitor
        self._job = f"handoff-{target}"
        self._node = f"handoff-to-{target}"

    async def connect(self, export: ExportUri) -> None:
        """Opens the export, before `begin`; does nothing when the job is there."""
        if await self.look() is not None:
            return
        await self._give_up_node()
        try:
            await self._add_node(export)
        except HandoffError:
            with contextlib.suppress(HandoffError):
                await self._give_up_node()
            raise

    async def begin(
        self,
        node: str,
        *,
        speed_bytes_per_s: int,
        write_blocking: bool,
        top_only: bool = False,
        in_flight_bytes: int = 0,
    ) -> None:
        """Starts to mirror `node`; does nothing when the job is there.

        `top_only`: not what the node is backed by. `in_flight_bytes`: what may be on its way at once, whole MiB, or
        copies would begin within them and take zeros along with data; 0: as QEMU likes.
        """
        if await self.look() is not None:
            return
        await self._monitor.execute(
            "blockdev-mirror",
            {
                "job-id": self._job,
                "device": node,
                "target": self._node,
                "sync": "top" if top_only else "full",
                "speed": speed_bytes_per_s,
                "buf-size": in_flight_bytes,
                "on-source-error": "report",
                "on-target-error": "report",
                "copy-mode": "write-blocking" if write_blocking else "background",
                "auto-dismiss": False,
            },
        )

    async def _add_node(self, export: ExportUri) -> None:
        tls: dict[str, Json] = {"tls-creds": self._tls_object} if self._tls_credentials else {}
        if tls:
            await self._monitor.execute(
                "object-add",
                {
                    "qom-type": "tls-creds-x509",
                    "id": self._tls_object,
                    "endpoint": "client",
                    "dir": self._tls_credentials,
                },
            )
        await self._monitor.execute(
            "blockdev-add",
            {
                "driver": "nbd",
                "node-name": self._node,
                "server": {"type": "inet", "host": export.host, "port": str(export.port)},
                "export": export.name,
                "open-timeout": OPEN_TIMEOUT_S,
                "discard": "unmap",
                "detect-zeroes": "unmap",
                **tls,
            },
        )

    async def look(self) -> JobInfo | None:
        """How far it is; None when there is no job."""
        jobs = cast(Sequence[Mapping[str, Json]], await self._monitor.execute("query-block-jobs"))
        return next((parse_job(job) for job in jobs if job.get("device") == self._job), None)

    async def set_speed(self, bytes_per_s: int) -> None:
        """Bounds what is sent in the background; 0: no bound."""
        await self._monitor.execute("block-job-set-speed", {"device": self._job, "speed": bytes_per_s})

    async def block_writes(self) -> bool:
        """From now on the guest's writes wait until the destination has them; False before QEMU 8.2, which can't."""
        try:
            await self._monitor.execute(
                "block-job-change", {"id": self._job, "type": "mirror", "copy-mode": "write-blocking"}
            )
        except QmpError as error:
            if error.error_class == "CommandNotFound":
                return False
            raise
        return True

    async def complete(self) -> None:
        """Sends what is left, with a flush, and lets go of the export; for a guest that is paused.

        Does nothing when that was done. Raises PreconditionError when the mirror has failed, or is not in step.
        """
        job = await self.look()
        if job is not None and not job.concluded:
            if not job.ready:
                raise PreconditionError(f"disk {self.target} is not in step with its copy")
            await self._monitor.execute("block-job-cancel", {"device": self._job})
            job = await self._concluded()
        if job is not None:
            await self._dismiss()
            if job.error:
                await self._give_up_node()
                raise PreconditionError(f"disk {self.target} could not be copied: {job.error}")
            await self._remove_node()

    async def _concluded(self) -> JobInfo | None:
        while True:
            job = await self.look()
            if job is None or job.concluded:
                return job
            await asyncio.sleep(COMPLETE_POLL_S)

    async def cancel(self) -> None:
        """Gives it up and removes what it left. Raises DeadlineError when QEMU does not let go."""
        deadline, yank_at = time.monotonic() + CANCEL_TIMEOUT_S, time.monotonic() + YANK_AFTER_S
        while (job := await self.look()) is not None:
            if job.concluded:
                await self._dismiss()
                continue
            with contextlib.suppress(QmpError):  # it has just ended, or is told already
                await self._monitor.execute("block-job-cancel", {"device": self._job, "force": True})
            now = time.monotonic()
            if now > deadline:
                raise DeadlineError(f"the mirror of disk {self.target} does not end; see virsh qemu-monitor-command")
            if now > yank_at:
                yank_at = deadline
                await self._yank()
            await asyncio.sleep(CANCEL_POLL_S)
        await self._give_up_node()

    async def _yank(self) -> None:
        instance: Json = {"type": "block-node", "node-name": self._node}
        with contextlib.suppress(QmpError):
            await self._monitor.execute("yank", {"instances": [instance]})

    async def _dismiss(self) -> None:
        with contextlib.suppress(QmpError):
            await self._monitor.execute("job-dismiss", {"id": self._job})

    async def _give_up_node(self) -> None:
        """Cuts the connection first: blockdev-del flushes, and QEMU stops, guest and all, until a dead link answers."""
        await self._yank()
        await self._remove_node()

    async def _remove_node(self) -> None:
        reply = await self._monitor.execute("query-named-block-nodes", {"flat": True})
        nodes = cast(Sequence[Mapping[str, Json]], reply)
        if any(node.get("node-name") == self._node for node in nodes):
            await self._monitor.execute("blockdev-del", {"node-name": self._node})
        if self._tls_credentials:
            with contextlib.suppress(QmpError):  # there is none
                await self._monitor.execute("object-del", {"id": self._tls_object})
