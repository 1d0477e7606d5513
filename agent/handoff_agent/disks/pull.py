"""Pulls what a disk still lacks, while its guest runs here, or after it was shut down.

    guest runs      libvirt's block pull
    guest is off    qemu-img rebase

Whoever was interrupted is begun again: what has been pulled stays pulled. While the source can't be reached, reads of
the guest wait, and so does the pull.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

import libvirt
import structlog

from handoff.agent.v1 import disk_pb2 as pb
from handoff_agent.disks.qemu_img import is_flat, options, qemu_img
from handoff_agent.disks.uris import parse_uri
from handoff_agent.domains import is_active
from handoff_agent.slots import Slot
from handoff_common.errors import HandoffError, UnavailableError

POLL_S: Final = 0.5
RETRY_S: Final = 2.0
# A source that gives nothing for longer is told of.
STALL_S: Final = 10.0

Report = Callable[[pb.DiskProgress], None]


class Pull:
    """The pull of one disk."""

    def __init__(
        self, slot: Slot, uuid: str, move: pb.DiskMove, bytes_per_s: int, log: structlog.typing.FilteringBoundLogger
    ) -> None:
        """`bytes_per_s`: largest rate; 0 for none."""
        self._slot = slot
        self._uuid = uuid
        self._move = move
        self._bytes_per_s = bytes_per_s
        self._log = log
        self._last = (time.monotonic(), 0)
        self._total = move.bytes_to_send

    async def run(self, report: Report) -> None:
        """Returns when the image, by its own word, needs nothing of the source any more. Never gives up."""
        while True:
            try:
                if await is_flat(self._move.path):
                    report(self._reading(pb.DISK_PHASE_COMPLETE, self._move.bytes_to_send, self._move.bytes_to_send))
                    return
                if await is_active(self._slot, self._uuid):
                    await self._pull(report)
                else:
                    await self._rebase(report)
            except HandoffError as error:
                self._log.warning("pull goes on", disk=self._move.target, error=error.message)
                report(self._reading(pb.DISK_PHASE_PULLING, self._last[1], self._total, error.message))
                await asyncio.sleep(RETRY_S)

    async def _pull(self, report: Report) -> None:
        """One block pull, to its end, good or bad."""
        target = self._move.target

        def begin(domain: libvirt.virDomain) -> None:
            if not domain.blockJobInfo(target):
                domain.blockPull(target, self._bytes_per_s, libvirt.VIR_DOMAIN_BLOCK_PULL_BANDWIDTH_BYTES)

        await self._slot.on_domain(self._uuid, begin)
        done, since_s = -1, time.monotonic()
        while job := await self._slot.on_domain(self._uuid, lambda domain: domain.blockJobInfo(target)):
            if job["cur"] != done:
                done, since_s = job["cur"], time.monotonic()
            stalls = time.monotonic() - since_s > STALL_S
            report(self._reading(pb.DISK_PHASE_PULLING, done, job["end"], self._silence() if stalls else ""))
            await asyncio.sleep(POLL_S)
        if not await is_flat(self._move.path):
            raise UnavailableError(f"the pull of disk {target} has ended early; see virsh domblkerror")

    async def _rebase(self, report: Report) -> None:
        """Bounded as the block pull is: by what is gone through."""
        size = self._move.virtual_size_bytes

        def hear(percent: float) -> None:
            report(self._reading(pb.DISK_PHASE_PULLING, int(size * percent / 100), size))

        image = {"driver": self._move.format, "file.driver": "file", "file.filename": self._move.path}
        limit: tuple[str, ...] = ()
        if self._bytes_per_s:
            limit = ("--object", f"throttle-group,id=pull,limits.bps-read={self._bytes_per_s}")
            image |= {"backing.driver": "throttle", "backing.throttle-group": "pull"}
        await qemu_img("rebase", "-p", *limit, "--image-opts", "-b", "", options(image), on_progress=hear)

    def _silence(self) -> str:
        base = parse_uri(self._move.base_uri)
        return (
            f"nothing comes from {base.host}:{base.port}; what the guest reads of disk {self._move.target} that is not"
            " here yet waits for it"
        )

    def _reading(self, phase: pb.DiskPhase.ValueType, done: int, total: int, trouble: str = "") -> pb.DiskProgress:
        (then_s, before), now_s = self._last, time.monotonic()
        self._last, self._total = (now_s, done), total
        rate = int(max(0, done - before) / (now_s - then_s)) if now_s > then_s and before else 0
        return pb.DiskProgress(
            target=self._move.target,
            phase=phase,
            done_bytes=done,
            total_bytes=total,
            bytes_per_s=rate,
            decision=trouble,
        )
