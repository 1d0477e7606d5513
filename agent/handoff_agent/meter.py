"""Readings of query-migrate, turned into what the convergence policy and the operator want to see."""

import time

from handoff.agent.v1 import qemu_pb2 as pb
from handoff_agent.convergence import Sample, expected_downtime_ms
from handoff_agent.handoff import timestamp
from handoff_agent.monitor import MigrationInfo

SHORTEST_PASS_S = 0.001


class Meter:
    """Follows one transfer: what QEMU does not count is measured from one reading to the next."""

    def __init__(self) -> None:
        self.rate_bytes_per_s = 0.0
        """Rate of the copy at full speed."""
        self._pass = 0
        self._pass_began_s = 0.0
        self._dirty_bytes_per_s = 0.0

    def sample(self, info: MigrationInfo, *, full_speed: bool) -> Sample:
        """The reading as the policy wants it; one at less than full speed keeps the rate measured before."""
        now_s = time.monotonic()
        if info.iterations != self._pass:
            previous_s = now_s - self._pass_began_s
            self._pass, self._pass_began_s = info.iterations, now_s
            if info.iterations > 1:
                # QEMU measures a dirty rate only once a second.
                self._dirty_bytes_per_s = info.ram_remaining_bytes / max(previous_s, SHORTEST_PASS_S)
        sample = Sample(
            elapsed_s=info.total_ms / 1000,
            pass_elapsed_s=now_s - self._pass_began_s,
            ram_total_bytes=info.ram_total_bytes,
            ram_transferred_bytes=info.ram_transferred_bytes,
            ram_remaining_bytes=info.ram_remaining_bytes,
            throughput_bytes_per_s=info.throughput_bytes_per_s if full_speed else int(self.rate_bytes_per_s),
            dirty_bytes_per_s=info.dirty_bytes_per_s or int(self._dirty_bytes_per_s),
            iterations=info.iterations,
            cpu_throttle_percent=info.cpu_throttle_percent,
        )
        if full_speed:
            self.rate_bytes_per_s = sample.rate_bytes_per_s
        return sample


def progress(info: MigrationInfo, sample: Sample, decision: str) -> pb.TransferProgress:
    """The reading as the API shows it."""
    return pb.TransferProgress(
        time=timestamp(time.time()),
        ram_total_bytes=info.ram_total_bytes,
        ram_transferred_bytes=info.ram_transferred_bytes,
        ram_remaining_bytes=info.ram_remaining_bytes,
        throughput_bytes_per_s=info.throughput_bytes_per_s or int(sample.rate_bytes_per_s),
        dirty_bytes_per_s=sample.dirty_bytes_per_s,
        iterations=info.iterations,
        cpu_throttle_percent=info.cpu_throttle_percent,
        expected_downtime_ms=int(expected_downtime_ms(sample) or 0),
        elapsed_ms=info.total_ms,
        decision=decision,
    )


def final_progress(last: pb.TransferProgress | None, info: MigrationInfo) -> pb.TransferProgress:
    """The last reading with QEMU's final figures: much is sent in the pause, when nobody looks."""
    progress = pb.TransferProgress()
    if last is not None:
        progress.CopyFrom(last)
    progress.time.CopyFrom(timestamp(time.time()))
    progress.ram_transferred_bytes = info.ram_transferred_bytes
    progress.ram_remaining_bytes = info.ram_remaining_bytes
    progress.iterations = info.iterations
    progress.elapsed_ms = info.total_ms
    return progress
