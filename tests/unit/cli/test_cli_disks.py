"""What people see of disks."""

import io

from cli_samples import COPYING, GIB, MIB, PLANNED, PREPARING, START, WHOLE_WAY, a_migration
from rich.console import Console, RenderableType

from handoff.agent.v1.disk_pb2 import DiskMove, DiskPhase, DiskProgress, DiskStrategy
from handoff.agent.v1.qemu_pb2 import TransferProgress
from handoff_cli.render.disks import plan_view
from handoff_cli.render.progress import has_progress, live_view, progress_line
from handoff_cli.render.record import record

MOVES = (
    DiskMove(
        target="vda",
        strategy=DiskStrategy.DISK_STRATEGY_CONVERT,
        path="/srv/ssd/web.raw",
        virtual_size_bytes=40 * GIB,
        bytes_to_send=7 * GIB,
        reason="hosts of the type ssd have it as raw",
    ),
    DiskMove(target="vdb", strategy=DiskStrategy.DISK_STRATEGY_PULL, path="/b", bytes_to_send=3 * GIB, reason="fast"),
    DiskMove(target="vdc", strategy=DiskStrategy.DISK_STRATEGY_SKIP, path="nbd:x", reason="network volume"),
)


def text(renderable: RenderableType, width: int = 200) -> str:
    out = io.StringIO()
    Console(file=out, width=width, markup=False, highlight=False, emoji=False).print(renderable)
    return out.getvalue()


def test_the_plan_says_what_is_done_with_each_disk_and_why() -> None:
    shown = text(plan_view(a_migration((PLANNED,), disks=MOVES)))
    assert "web-1, h1 → h2: nothing is in the way." in shown
    assert "vda   convert   40.0 GiB  7.00 GiB  /srv/ssd/web.raw" in shown
    assert "Disks to send: 10.0 GiB at the most, 3.00 GiB of it after the switch." in shown
    assert "has no disks" in text(plan_view(a_migration((PLANNED,))))


def test_the_record_has_the_plan() -> None:
    migration = a_migration(disks=MOVES)
    migration.options.fast = True
    shown = text(record(migration, START))
    assert "network volume" in shown
    assert "fast" in shown


def test_disks_are_seen_before_the_memory() -> None:
    disk = DiskProgress(
        target="vda",
        phase=DiskPhase.DISK_PHASE_SENDING,
        done_bytes=100 * MIB,
        total_bytes=400 * MIB,
        bytes_per_s=50 * MIB,
        write_blocking=True,
    )
    migration = a_migration((PLANNED, PREPARING, COPYING), progress=TransferProgress(disks=[disk]))
    assert has_progress(migration)
    expected = "disk vda 100 MiB of 400 MiB sent at 50.0 MiB/s, guest writes wait for it"
    assert expected in text(live_view(migration, START))
    assert expected in text(progress_line(migration.progress))


def test_a_pull_is_seen_while_the_rest_is_finished() -> None:
    disk = DiskProgress(target="vda", phase=DiskPhase.DISK_PHASE_PULLING, done_bytes=MIB, total_bytes=9 * MIB)
    migration = a_migration(WHOLE_WAY[:-1], progress=TransferProgress(ram_total_bytes=GIB, disks=[disk]))
    assert has_progress(migration)
    assert "disk vda 1.00 MiB of 9.00 MiB pulled" in text(live_view(migration, START))
    assert not has_progress(a_migration(WHOLE_WAY[:-1], progress=TransferProgress(ram_total_bytes=GIB)))
