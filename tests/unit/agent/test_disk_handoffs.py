"""A guest with local disks goes from one real libvirtd to another; QEMU 10, the guest is firmware."""

import asyncio
import os
import subprocess
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import libvirt
import pytest
from builds import QEMU, Builds
from one_host import domains, remove_all
from ports import port
from test_handoffs import LIMITS, MEMORY_MIB, Host, Move, frozen
from test_mirror import Wire

from handoff.agent.v1 import qemu_pb2 as pb
from handoff_agent.companions import SourceCompanion
from handoff_agent.descriptors import Descriptor
from handoff_agent.destination import DestinationHandoff
from handoff_agent.disks import flows
from handoff_agent.disks.moves import moves_of
from handoff_agent.disks.settings import StorageSettings
from handoff_agent.disks.source import DepartingDisks
from handoff_agent.disks.space import space_needed_bytes
from handoff_agent.disks.storage_daemon import StorageDaemon
from handoff_agent.disks.uris import ExportUri, parse_uri
from handoff_agent.events import ConnectionEvent
from handoff_agent.monitor import Json, Monitor
from handoff_agent.rules import (
    ACTIVE,
    DESTINATION,
    FAILED,
    FINAL_STATES,
    FINALIZED,
    HELD,
    PREPARED,
    READY,
    RELEASED,
    SOURCE,
    TRANSFERRING,
    Call,
    State,
)
from handoff_agent.settings import HostTypeSettings
from handoff_common.errors import ExhaustedError, PreconditionError

DATA_MIB = 24
ZEROS_MIB = 16
SIZE_MIB = 256


def make_image(path: Path, image_format: str) -> None:
    """Data, then allocated zeros, then a hole."""
    subprocess.run(["qemu-img", "create", "-q", "-f", image_format, str(path), f"{SIZE_MIB}M"], check=True)
    writes = ["-c", f"write -P 7 1M {DATA_MIB}M", "-c", f"write -P 0 100M {ZEROS_MIB}M"]
    subprocess.run(["qemu-io", "-f", image_format, *writes, str(path)], check=True, stdout=subprocess.DEVNULL)


def same(one: Path, two: Path) -> bool:
    compared = subprocess.run(["qemu-img", "compare", str(one), str(two)], check=False, stdout=subprocess.DEVNULL)
    return compared.returncode == 0


def allocated_mib(path: Path) -> float:
    return path.stat().st_blocks / 2048


@pytest.fixture(params=["qcow2-qcow2", "qcow2-raw", "raw-raw", "raw-qcow2"])
def formats(request: pytest.FixtureRequest) -> tuple[str, str]:
    here, _, there = str(request.param).partition("-")
    return here, there


@pytest.fixture
async def move(
    libvirtd: str,
    other_libvirtd: str,
    builds: Builds,
    tmp_path_factory: pytest.TempPathFactory,
    formats: tuple[str, str],
) -> AsyncIterator[Move]:
    directory = tmp_path_factory.mktemp("d")  # sockets are in it, and their paths must be short
    folders = directory / "disks-1", directory / "disks-2"
    for folder in folders:
        folder.mkdir()
    make_image(folders[0] / f"a.{formats[0]}", formats[0])
    here = HostTypeSettings(folder=str(folders[0]))
    there = HostTypeSettings(folder=str(folders[1]), format=formats[1])
    source = Host("h1", libvirtd, builds, directory / "1", port(0), here)
    target = Host("h2", other_libvirtd, builds, directory / "2", port(16), there)
    identity, name = str(uuid.uuid4()), f"g-{uuid.uuid4().hex[:6]}"
    xml = f"""<domain type='qemu'><name>{name}</name><uuid>{identity}</uuid><memory unit='MiB'>{MEMORY_MIB}</memory>
    <vcpu>1</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features><devices>
    <emulator>{QEMU}</emulator>
    <disk type='file' device='disk'><driver name='qemu' type='{formats[0]}' cache='none' discard='unmap'/>
    <source file='{folders[0]}/a.{formats[0]}'/><target dev='vda' bus='virtio'/></disk>
    </devices></domain>"""
    async with source.running(), target.running():
        await source.slot.call(lambda connection: connection.defineXML(xml).create())
        yield Move(f"m-{uuid.uuid4().hex[:8]}", source, target, identity)
        for handoff in target.handoffs.all():
            if handoff.state not in FINAL_STATES:
                await target.handoffs.abort(handoff.record.migration_id, DESTINATION, "the test is over")
        await remove_all(source.hypervisor, target.hypervisor)


def images(move: Move) -> tuple[list[Path], list[Path]]:
    """By their names; see `nothing_left` for their marks."""
    one, two = (sorted(folder_of(host).glob("[!.]*")) for host in (move.source, move.target))
    return one, two


def folder_of(host: Host) -> Path:
    return Path(host.settings.place_of_disks().folder)


def nothing_left(move: Move) -> bool:
    """No storage daemon runs, no folder of one is there, and no image is marked."""
    return not any(
        [*(host.state_dir / "storage").glob("*"), *folder_of(host).glob(".*")] for host in (move.source, move.target)
    )


async def left_in_qemu(host: Host, guest: str) -> list[str]:
    """Jobs and nodes of ours."""
    monitor = Monitor(host.slot, guest)
    jobs = cast(list[dict[str, str]], await monitor.execute("query-block-jobs"))
    nodes = cast(list[dict[str, str]], await monitor.execute("query-named-block-nodes"))
    return [job["device"] for job in jobs] + [node["node-name"] for node in nodes if "handoff" in node["node-name"]]


async def test_a_local_disk_goes_along(move: Move, formats: tuple[str, str]) -> None:
    before = Path(images(move)[0][0])
    kept = before.with_name("a.orig")
    os.link(before, kept)
    await move.advance(HELD)
    destination = move.target.handoffs.destination(move.id, Call.ACTIVATE)
    await destination.activate()
    assert destination.state == ACTIVE, destination.record.message
    source = move.source.handoffs.source(move.id, Call.RELEASE)
    await destination.finalize()
    await source.release()
    assert (source.state, destination.state) == (RELEASED, FINALIZED)
    left, (arrived,) = images(move)
    assert left == [kept]
    assert arrived.name == f"a.{formats[1]}"
    assert str(arrived) in await definition(move.target, move.guest)
    await move.target.slot.on_domain(move.guest, lambda d: d.destroy())
    await move.target.slot.on_domain(move.guest, lambda d: d.create())
    await move.target.slot.on_domain(move.guest, lambda d: d.destroy())
    assert same(left[0], arrived)
    assert allocated_mib(arrived) < DATA_MIB + 2
    assert nothing_left(move)


@pytest.mark.parametrize("stage", [READY, HELD], ids=["ready", "held"])
async def test_an_abort_leaves_no_image(move: Move, stage: State) -> None:
    await move.advance(stage)
    await move.abort()
    assert await move.is_running(move.source)
    assert await left_in_qemu(move.source, move.guest) == []
    assert images(move)[1] == []
    assert len(images(move)[0]) == 1
    assert nothing_left(move)
    await replace(move, id=f"{move.id}-again").advance(HELD)


async def definition(host: Host, guest: str) -> str:
    return await host.slot.on_domain(guest, lambda domain: domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))


async def guest_writes(host: Host, guest: str, byte: int, at_mib: int) -> None:
    """As the guest's own disk device would."""
    device = "/machine/peripheral/virtio-disk0/virtio-backend"
    line = f'qemu-io -d {device} "write -P {byte} {at_mib}M 1M"'
    told = await Monitor(host.slot, guest).execute("human-monitor-command", {"command-line": line})
    assert not told


async def pulled(destination: DestinationHandoff) -> None:
    deadline = time.monotonic() + 60
    while destination.record.pulling:
        assert time.monotonic() < deadline, destination.to_message()
        await asyncio.sleep(0.1)


def holds(path: Path, byte: int, at_mib: int) -> bool:
    read = subprocess.run(
        ["qemu-io", "-r", "-U", "-c", f"read -P {byte} {at_mib}M 1M", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    return read.returncode == 0 and "verification failed" not in read.stdout


@pytest.mark.parametrize("formats", [("qcow2", "qcow2"), ("raw", "raw")], ids=["qcow2", "raw"])
async def test_what_is_pulled_comes_after_the_guest(move: Move) -> None:
    move = replace(move, fast=True)
    await move.advance(READY)
    (base, overlay), (arriving,) = images(move)
    assert overlay.name == f"{base.name}.{move.id}"
    await guest_writes(move.source, move.guest, 9, 5)
    side = move.source.handoffs.source(move.id, Call.SWITCH_OVER)
    await side.switch_over()
    assert (await move.until(HELD)).state == HELD
    assert allocated_mib(arriving) < 4
    destination = move.target.handoffs.destination(move.id, Call.ACTIVATE)
    assert destination.record.pulling
    await destination.activate()
    assert destination.state == ACTIVE, destination.record.message
    await guest_writes(move.target, move.guest, 11, 7)
    await pulled(destination)
    await destination.finalize()
    await side.release()
    assert images(move)[0] == []
    assert arriving.suffix == ".qcow2"
    assert allocated_mib(arriving) < DATA_MIB + 3
    live = await move.target.slot.on_domain(move.guest, lambda d: d.XMLDesc(0))
    assert "nbd" not in live
    for started in (False, True):
        await move.target.slot.on_domain(move.guest, lambda d, on=started: d.create() if on else d.destroy())
    await move.target.slot.on_domain(move.guest, lambda d: d.destroy())
    for byte, at_mib in ((7, 1), (9, 5), (11, 7), (0, 100)):
        assert holds(arriving, byte, at_mib), at_mib
    assert nothing_left(move)


@pytest.mark.parametrize("formats", [("qcow2", "qcow2"), ("raw", "raw")], ids=["qcow2", "raw"])
@pytest.mark.parametrize("stage", [PREPARED, READY, HELD], ids=["prepared", "ready", "held"])
async def test_a_pull_that_is_aborted_before_the_switch_was_never_tried(move: Move, stage: State) -> None:
    move = replace(move, fast=True)
    before = await definition(move.source, move.guest)
    (base,), _ = images(move)
    await move.advance(stage)
    if stage != HELD:
        await guest_writes(move.source, move.guest, 9, 5)
    await move.abort()
    assert await move.is_running(move.source)
    assert await left_in_qemu(move.source, move.guest) == []
    assert images(move) == ([base], [])
    assert await definition(move.source, move.guest) == before
    await move.source.slot.on_domain(move.guest, lambda d: d.destroy())
    assert holds(base, 7, 1)
    assert stage == HELD or holds(base, 9, 5)
    assert nothing_left(move)


async def sending(move: Move) -> None:
    """Returns while the disk is on its way."""
    handoff = move.source.handoffs.get(move.id, SOURCE)
    async with asyncio.timeout(30):
        while not any(disk.done_bytes for disk in handoff.disk_progress):  # noqa: ASYNC110 - progress has no event
            await asyncio.sleep(0.02)
    assert handoff.state == TRANSFERRING


def pace(move: Move) -> int:
    """What QEMU's connection for the disk may send, in bytes a second; 0: no bound."""
    export = parse_uri(moves_of(move.source.handoffs.get(move.id, SOURCE).record)[0].uri)
    (flow,) = flows.find(export.host, export.port)
    return flows.allowed_bytes_per_s(flow)


async def speed(move: Move) -> int:
    """What QEMU's mirror may go through, in bytes a second; 0: no bound."""
    (job,) = cast(list[dict[str, int]], await Monitor(move.source.slot, move.guest).execute("query-block-jobs"))
    return job["speed"]


class Died(BaseException):
    """The agent gets no further."""


@pytest.mark.parametrize("formats", [("qcow2", "qcow2")], ids=["qcow2"])
async def test_a_source_whose_agent_died_as_it_was_prepared_gives_its_disks(
    move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, guest = await move.source.handoffs.prepare_source(move.id, move.guest, validate_only=True)
    planned = await move.target.handoffs.prepare_destination(move.id, guest, "a", validate_only=True, fast=True)

    async def prepare() -> tuple[pb.SourceGuest, list[str]]:
        disks = planned.handoff.disks
        handoff, guest = await move.source.handoffs.prepare_source(
            move.id, move.guest, validate_only=False, disks=disks
        )
        return guest, [disk.base_uri for disk in handoff.disks]

    async def dies(*_: object) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(DepartingDisks, "_export_bases", dies)
        with pytest.raises(Died):
            await prepare()
    await move.source.restart()
    guest, given = await prepare()
    assert all(given)
    await move.target.handoffs.prepare_destination(move.id, guest, "a", validate_only=False, fast=True)
    await move.source.restart()
    assert (await prepare())[1] == given
    await move.abort()
    assert nothing_left(move)


@pytest.mark.parametrize("formats", [("qcow2", "raw")], ids=["qcow2-raw"])
async def test_agents_and_libvirtd_that_end_in_the_copy_are_no_matter(move: Move) -> None:
    """QEMU and the storage daemon go on, and are found again; QEMU keeps to its pace meanwhile."""
    move = replace(move, bandwidth=6 << 20)
    await move.advance(TRANSFERRING)
    await sending(move)
    assert 0.94 * move.bandwidth < pace(move) < 1.06 * move.bandwidth
    with frozen(move.source), move.source.slot.events() as events:
        await move.source.restart()
        await move.target.restart()
        async with asyncio.timeout(20):
            while not isinstance(await events.next(), ConnectionEvent):
                pass
    assert (await move.until(READY)).state == READY
    assert pace(move) == move.bandwidth
    await move.source.handoffs.source(move.id, Call.SWITCH_OVER).switch_over()
    assert (await move.until(HELD)).state == HELD
    await move.target.restart()
    destination = move.target.handoffs.destination(move.id, Call.ACTIVATE)
    await destination.activate()
    assert destination.state == ACTIVE
    await move.source.restart()
    await move.source.handoffs.source(move.id, Call.RELEASE).release()
    await destination.finalize()
    (arrived,) = images(move)[1]
    await move.target.slot.on_domain(move.guest, lambda d: d.destroy())
    assert holds(arrived, 7, 1)
    assert nothing_left(move)


def departing(move: Move) -> SourceCompanion:
    """The source's disks, as an agent finds them that has just started."""
    source = move.source
    settings = StorageSettings(source.state_dir / "storage", source.storage_address, "root")
    return DepartingDisks(source.handoffs.get(move.id, SOURCE), source.slot, settings, source.threads)


@pytest.mark.parametrize("formats", [("raw", "raw")], ids=["raw"])
async def test_the_pace_is_off_at_the_pause_and_stays_off(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    move = replace(move, bandwidth=16 << 20)
    await move.advance(READY)
    assert (pace(move), await speed(move)) == (move.bandwidth, 0)
    await departing(move).begin()
    assert (pace(move), await speed(move)) == (move.bandwidth, 0)
    await departing(move).ordered()
    assert (pace(move), await speed(move)) == (0, 0)

    async def no_link(export: ExportUri) -> None:
        raise PreconditionError(f"can't connect to the export {export}")

    monkeypatch.setattr("handoff_agent.disks.source.check_connection", no_link)
    await departing(move).begin()
    assert (pace(move), await speed(move)) == (0, move.bandwidth)
    await move.abort()


@pytest.mark.parametrize("formats", [("raw", "raw")], ids=["raw"])
async def test_where_the_kernel_paces_no_longer_qemu_does(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    move = replace(move, bandwidth=6 << 20)
    await move.advance(TRANSFERRING)
    await sending(move)
    assert await speed(move) == 0

    def fails(_: Descriptor) -> int:
        raise OSError("the test says so")

    monkeypatch.setattr(flows, "sent_bytes", fails)
    async with asyncio.timeout(10):
        while await speed(move) != move.bandwidth or pace(move) != 0:  # noqa: ASYNC110 - QEMU has no event for it
            await asyncio.sleep(0.02)
    monkeypatch.undo()
    assert (await move.until(READY)).state == READY
    await move.abort()


@pytest.mark.parametrize("formats", [("qcow2", "qcow2")], ids=["qcow2"])
async def test_a_pull_goes_on_after_the_guest_was_shut_down_and_the_agent_restarted(move: Move) -> None:
    move = replace(move, fast=True)
    move.target.pull_bytes_per_s = 24 << 20
    await move.advance(HELD)
    destination = move.target.handoffs.destination(move.id, Call.ACTIVATE)
    await destination.activate()
    await move.target.restart()
    destination = move.target.handoffs.destination(move.id, Call.ACTIVATE)
    assert destination.record.pulling
    await move.target.slot.on_domain(move.guest, lambda d: d.destroy())
    # As if the source's host had been off: its agent exports the base again, where it was.
    await StorageDaemon(move.source.state_dir / "storage" / move.id / "base", move.source.threads).stop()
    await move.source.restart()
    await pulled(destination)
    await destination.finalize()
    assert not destination.record.ended
    await move.source.handoffs.source(move.id, Call.RELEASE).release()
    (arrived,) = images(move)[1]
    assert holds(arrived, 7, 1)
    await move.target.slot.on_domain(move.guest, lambda d: d.create())
    assert nothing_left(move)


@pytest.mark.parametrize("formats", [("qcow2", "qcow2"), ("raw", "raw")], ids=["qcow2", "raw"])
async def test_a_guest_that_ends_before_the_switch_keeps_what_it_wrote_to_its_overlay(move: Move) -> None:
    """Nobody is there any more to commit it, and its next boot is from the base."""
    move = replace(move, fast=True)
    before = await definition(move.source, move.guest)
    (base,), _ = images(move)
    await move.advance(READY)
    await guest_writes(move.source, move.guest, 9, 5)
    await move.source.slot.on_domain(move.guest, lambda d: d.destroy())
    await move.until(FAILED)
    await move.abort()
    assert images(move) == ([base], [])
    assert await definition(move.source, move.guest) == before
    assert holds(base, 7, 1)
    assert holds(base, 9, 5)
    assert nothing_left(move)


@pytest.mark.parametrize("formats", [("qcow2", "qcow2")], ids=["qcow2"])
async def test_a_destination_that_is_fenced_in_the_pull_leaves_the_source_as_it_was_at_the_switch(move: Move) -> None:
    move = replace(move, fast=True)
    move.target.pull_bytes_per_s = 1 << 20
    await move.advance(READY)
    await guest_writes(move.source, move.guest, 9, 5)
    await move.source.handoffs.source(move.id, Call.SWITCH_OVER).switch_over()
    assert (await move.until(HELD)).state == HELD
    destination = move.target.handoffs.destination(move.id, Call.ACTIVATE)
    await destination.activate()
    await guest_writes(move.target, move.guest, 11, 7)
    assert destination.record.pulling
    # What the source gives comes back by itself.
    daemon = StorageDaemon(move.source.state_dir / "storage" / move.id / "base", move.source.threads)
    await daemon.stop()
    async with asyncio.timeout(10):
        while daemon.pid is None:  # noqa: ASYNC110 - another's process
            await asyncio.sleep(0.1)
    await move.source.handoffs.abort(move.id, SOURCE, "h2 is fenced")
    # It comes back, and finds the guest off.
    await move.target.slot.on_domain(move.guest, lambda d: d.destroy())
    await move.target.restart()
    await asyncio.sleep(1)
    await move.target.handoffs.abort(move.id, DESTINATION, "h2 is fenced", fenced=True)
    assert await move.is_running(move.source)
    assert await domains(move.target.hypervisor) == []
    ((base,), there) = images(move)
    assert there == []
    await move.source.slot.on_domain(move.guest, lambda d: d.destroy())
    assert holds(base, 9, 5)
    assert holds(base, 7, 7)
    assert nothing_left(move)


@pytest.mark.parametrize("formats", [("raw", "raw")], ids=["raw"])
async def test_an_image_that_another_guest_has_too_stays(move: Move) -> None:
    (image,), _ = images(move)
    other = f"""<domain type='qemu'><name>other-{move.id}</name><memory>65536</memory><os><type>hvm</type></os><devices>
    <disk type='file'><source file='{image}'/><target dev='vdb' bus='virtio'/><readonly/></disk></devices></domain>"""
    await move.source.slot.call(lambda connection: connection.defineXML(other))
    await move.advance(HELD)
    destination = move.target.handoffs.destination(move.id, Call.ACTIVATE)
    await destination.activate()
    await move.source.handoffs.source(move.id, Call.RELEASE).release()
    await destination.finalize()
    assert images(move)[0] == [image]


@pytest.mark.parametrize("formats", [("qcow2", "qcow2")], ids=["qcow2"])
async def test_a_destination_whose_exports_end_fails_the_copy(move: Move) -> None:
    move = replace(move, bandwidth=6 << 20)
    await move.advance(TRANSFERRING)
    await sending(move)
    await StorageDaemon(move.target.state_dir / "storage" / move.id / "images", move.target.threads).stop()
    failed = await move.until(FAILED)
    assert "disk vda could not be copied" in failed.message
    assert await move.is_running(move.source)
    await move.abort()
    assert await left_in_qemu(move.source, move.guest) == []
    assert images(move)[1] == []


@pytest.mark.parametrize("formats", [("raw", "raw")], ids=["raw"])
@pytest.mark.parametrize("when", ["copied", "ready"])
async def test_a_link_that_dies_does_not_keep_the_guest(move: Move, when: str) -> None:
    """While the disk is copied, an abort ends it; right before the pause QEMU itself hangs until it is cut."""
    source = await move.prepare_source()
    handoff = (await move.target.handoffs.prepare_destination(move.id, source, "a", validate_only=False)).handoff
    side = move.source.handoffs.source(move.id, Call.START_TRANSFER)
    wire = Wire(parse_uri(handoff.disks[0].uri))
    async with wire.open() as uri:
        handoff.disks[0].uri = str(uri)
        bandwidth = 6 << 20 if when == "copied" else 0
        await side.start_transfer(handoff.listen_uri, LIMITS, bandwidth, 1.0, handoff.disks)
        if when == "copied":
            await sending(move)
            wire.stuck = True
        else:
            assert (await move.until(READY)).state == READY
            await guest_writes(move.source, move.guest, 9, 5)
            wire.stuck = True
            # In flight, so that QEMU waits for it when it stops the guest.
            writing = asyncio.create_task(guest_writes(move.source, move.guest, 9, 6))
            await side.switch_over()
            failed = await move.until(HELD)
            assert failed.state == FAILED, failed
            assert "was paused for more than 1 s" in failed.message
            # The deadline, and half a second until the connection is cut.
            assert 1000 < failed.switch_timings.paused_to_resumed_ms < 4000
            await writing
        began = time.monotonic()
        await move.source.handoffs.abort(move.id, SOURCE, "the test says so")
        assert time.monotonic() - began < 6
        assert await move.is_running(move.source)
        assert await left_in_qemu(move.source, move.guest) == []
        wire.stuck = False


@pytest.mark.parametrize("formats", [("raw", "raw")], ids=["raw"])
async def test_a_link_that_dies_in_the_copy_ends_it(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is only slow does not."""
    monkeypatch.setattr("handoff_agent.disks.source.STALL_S", 1.0)
    source = await move.prepare_source()
    handoff = (await move.target.handoffs.prepare_destination(move.id, source, "a", validate_only=False)).handoff
    wire = Wire(parse_uri(handoff.disks[0].uri))
    async with wire.open() as uri:
        handoff.disks[0].uri = str(uri)
        side = move.source.handoffs.source(move.id, Call.START_TRANSFER)
        await side.start_transfer(handoff.listen_uri, LIMITS, 256 << 10, 1.0, handoff.disks)
        await sending(move)
        await asyncio.sleep(3)  # it sends a MiB in four seconds
        assert side.state == TRANSFERRING
        wire.stuck = True
        failed = await move.until(FAILED)
        assert "can't connect to the export" in failed.message
        await move.source.handoffs.abort(move.id, SOURCE, "the test says so")
        assert await move.is_running(move.source)
        assert await left_in_qemu(move.source, move.guest) == []
        wire.stuck = False


@pytest.mark.parametrize("formats", [("qcow2", "raw")], ids=["qcow2"])
async def test_what_stands_in_the_way_is_seen_before_anything_is_touched(move: Move) -> None:
    async def refused(words: str) -> None:
        _, guest = await move.source.handoffs.prepare_source(move.id, move.guest, validate_only=True)
        with pytest.raises(PreconditionError, match=words):
            await move.target.handoffs.prepare_destination(move.id, guest, "a", validate_only=True)

    there = Path(move.target.settings.place_of_disks().folder)
    (there / "a.raw").write_text("somebody else's")
    await refused("a.raw on host h2, where that file exists")
    (there / "a.raw").unlink()
    there.rename(there.with_name("moved"))  # noqa: ASYNC240
    await refused("has no such folder")
    there.with_name("moved").rename(there)
    nodes = await Monitor(move.source.slot, move.guest).execute("query-block")
    (node,) = [each["inserted"]["node-name"] for each in cast(list[dict[str, dict[str, str]]], nodes)]
    bitmap: dict[str, Json] = {"node": node, "name": "backup-1", "persistent": True}
    await Monitor(move.source.slot, move.guest).execute("block-dirty-bitmap-add", bitmap)
    _, guest = await move.source.handoffs.prepare_source(move.id, move.guest, validate_only=True)
    planned = await move.target.handoffs.prepare_destination(move.id, guest, "a", validate_only=True)
    assert "its dirty bitmaps (backup-1) are lost" in planned.handoff.disks[0].reason
    snapshot = {"device": node, "name": "before-upgrade"}
    await Monitor(move.source.slot, move.guest).execute("blockdev-snapshot-internal-sync", snapshot)
    await refused("disk vda has 1 snapshots inside")
    assert images(move)[1] == []
    assert not move.target.handoffs.all()


@pytest.mark.parametrize("formats", [("raw", "raw")], ids=["raw"])
async def test_two_that_come_at_once_do_not_share_their_space(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    _, other = await move.source.handoffs.prepare_source("other", move.guest, validate_only=True)
    other.domain.uuid, other.domain.name = str(uuid.uuid4()), "other"
    other.disks[0].source = other.disks[0].source.replace("a.raw", "b.raw")
    move = replace(move, bandwidth=6 << 20)
    await move.advance(TRANSFERRING)
    await sending(move)
    needed = space_needed_bytes(moves_of(move.target.handoffs.get(move.id, DESTINATION).record)[0])
    real, free = os.statvfs, needed + (16 << 20)

    def nearly_full(path: Path) -> os.statvfs_result:
        told = real(path)
        return os.statvfs_result((told.f_bsize, 1, *told[2:4], free, *told[5:]))

    monkeypatch.setattr("handoff_agent.disks.images.os.statvfs", nearly_full)
    for validate_only in (True, False):
        with pytest.raises(ExhaustedError, match=r"MiB free and has promised \d+ MiB to disks on their way there \(g-"):
            await move.target.handoffs.prepare_destination("other", other, "a", validate_only=validate_only)
    await move.abort()
    planned = await move.target.handoffs.prepare_destination("other", other, "a", validate_only=True)
    assert planned.handoff.disks[0].path.endswith("b.raw")
