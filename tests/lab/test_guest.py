"""The lab's guests and the judges inside and around them: they see what they are there to see."""

import asyncio
import json
import mmap
import os
import signal
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from handoff_lab.fleet import Fleet
from handoff_lab.gateway import NAME as GATEWAY
from handoff_lab.guest import Guests, virsh
from handoff_lab.journal import REGION_BEGIN, check_image
from handoff_lab.main import main
from handoff_lab.probe import GuestControl, PingProbe, TcpSession, UdpProbe
from handoff_lab.state import GuestRecord

pytestmark = pytest.mark.lab


def control(fleet: Fleet, guest: GuestRecord) -> GuestControl:
    return GuestControl(fleet.node("h3"), guest.ip)


async def poll(condition: Callable[[], Awaitable[bool]], deadline_s: float = 60) -> None:
    async with asyncio.timeout(deadline_s):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def journal_reached(inside: GuestControl, seq: int) -> bool:
    return (await inside.status()).journal.acked_seq >= seq


async def dirtier_passed(inside: GuestControl, passes: int) -> bool:
    return (await inside.status()).dirty.passes >= passes


async def test_a_guest_answers_from_another_host(fleet: Fleet, guests: Guests) -> None:
    guest = await asyncio.to_thread(guests.create, "g1", "h1")
    node = fleet.node("h3")
    async with UdpProbe(fleet.lab, node, guest.ip) as udp, TcpSession(node, guest.ip) as tcp:
        await asyncio.sleep(2)
    assert udp.result().sent > 1000
    assert udp.result().lost <= udp.result().sent // 50
    assert udp.result().duplicated == 0
    assert tcp.result().survived
    assert tcp.result().counters > 100
    status = await control(fleet, guest).status()
    assert status.net.udp_echoed >= udp.result().received
    assert "HANDOFF-GUEST READY" in (fleet.lab.shared / "g1.console").read_text(errors="replace")


async def test_several_guests_at_once_and_the_list(fleet: Fleet, guests: Guests) -> None:
    environment = {"HANDOFF_LAB_DIR": str(fleet.lab.directory)}
    arguments = ["guest", "create", "a", "b", "--host", "h2", "--disk", "format=qcow2,place=local"]
    made = await asyncio.to_thread(CliRunner().invoke, main, arguments, env=environment)
    assert made.exit_code == 0, made.output
    listed = await asyncio.to_thread(CliRunner().invoke, main, ["guest", "list", "-o", "json"], env=environment)
    rows = {row["name"]: row for row in json.loads(listed.output)}
    assert {name: (row["host"], row["slot"], row["state"]) for name, row in rows.items()} == {
        "a": ("h2", "a", "running"),
        "b": ("h2", "a", "running"),
    }
    assert rows["a"]["ip"] != rows["b"]["ip"]
    assert (fleet.lab.node("h2") / "vms/a-vda.qcow2").exists()


async def test_a_cut_link_is_a_silence_that_tcp_survives(fleet: Fleet, guests: Guests) -> None:
    guest = await asyncio.to_thread(guests.create, "g1", "h1")
    async with TcpSession(fleet.node("h3"), guest.ip) as tcp:
        fleet.set_link("h1", up=False, management=False)
        await asyncio.sleep(1.5)
        fleet.set_link("h1", up=True, management=False)
        seen = tcp.counters
        await poll(lambda: asyncio.sleep(0, tcp.counters >= seen + 20))
    assert tcp.result().survived
    assert tcp.result().longest_silence_ms > 1400


async def test_a_pause_is_told_by_the_guests_own_clock(fleet: Fleet, guests: Guests) -> None:
    """Seen from another host and from the gateway, by echoes and by pings."""
    guest = await asyncio.to_thread(guests.create, "g1", "h1", 128, disks=())
    host, here, gateway = fleet.host("h1"), fleet.node("h3"), fleet.node(GATEWAY)
    async with (
        UdpProbe(fleet.lab, here, guest.ip, 2000) as udp,
        UdpProbe(fleet.lab, gateway, guest.ip, 2000) as outside,
        PingProbe(fleet.lab, here, guest.ip, 10_000) as pings,
    ):
        await asyncio.sleep(1)
        began = time.monotonic()
        await asyncio.to_thread(virsh, host, "a", "suspend", "g1")
        await asyncio.sleep(0.5)
        await asyncio.to_thread(virsh, host, "a", "resume", "g1")
        longest_ms = 1000 * (time.monotonic() - began)
        await asyncio.sleep(1)
    for seen in (udp.result(), outside.result()):
        gap = seen.longest_gap
        standstill = seen.standstill(gap.began_at_s, gap.began_at_s + gap.length_ms / 1000)
        assert standstill is not None
        # The gap itself is no bound: it begins with the last answer, which may arrive after the guest was stopped.
        assert 500 - standstill.inexact_ms < standstill.length_ms < longest_ms + standstill.inexact_ms, seen
        assert gap.length_ms > 500, seen
        assert seen.waited > 0, seen
    assert pings.result().longest_gap_ms > 500
    assert pings.result().clock == ()


@pytest.mark.parametrize("disk", ["format=raw", "format=qcow2,place=local"])
async def test_the_journal_sees_torn_and_lost_records(fleet: Fleet, guests: Guests, disk: str) -> None:
    guest = await asyncio.to_thread(guests.create, "g1", "h1", disks=(disk,))
    inside = control(fleet, guest)
    await inside.journal_start(rate_mib_per_s=2, span_mib=1)
    await poll(lambda: journal_reached(inside, 600))  # more than twice round
    last = await inside.journal_stop()
    assert (await inside.journal_verify()).intact
    guests_dir = fleet.lab.shared if guest.disks[0].place == "shared" else fleet.lab.node("h1") / "vms"
    image = guests_dir / Path(guest.disks[0].path).name
    if guest.disks[0].format == "raw":
        assert check_image(image, "raw", last.epoch, last.slots, last.acked_seq).intact
        with image.open("r+b") as file:
            file.seek(REGION_BEGIN + 5 * 4096 + 1000)
            file.write(b"torn")
            file.seek(REGION_BEGIN + 7 * 4096)
            file.write(bytes(4096))
        os.sync()
        check = await inside.journal_verify()
        assert (check.torn, check.lost, check.intact) == (1, 1, False)
        outside = check_image(image, "raw", last.epoch, last.slots, last.acked_seq)
        assert (outside.torn, outside.lost) == (1, 1)
        assert not check_image(image, "raw", last.epoch, last.slots, last.acked_seq + last.slots).intact
    else:
        await asyncio.to_thread(guests.fleet.host("h1").node.run, ["virsh", "destroy", "g1"])
        assert check_image(image, "qcow2", last.epoch, last.slots, last.acked_seq).intact


async def test_a_killed_guest_is_off_until_it_is_created_again(fleet: Fleet, guests: Guests) -> None:
    guest = await asyncio.to_thread(guests.create, "g1", "h1", disks=())
    booted = (await control(fleet, guest).status()).boot_id
    guests.signal("g1", signal.SIGKILL)
    await poll(lambda: asyncio.to_thread(is_off, guests, "g1"))
    assert await asyncio.to_thread(guests.create, "g1", "h1", disks=()) == guest
    assert (await control(fleet, guest).status()).boot_id != booted


def is_off(guests: Guests, name: str) -> bool:
    return [seen.state for seen in guests.find(name)] == ["shut off"]


def mix(a: int, b: int) -> int:
    """As in lab/guest/util.c."""
    mask = (1 << 64) - 1
    x = (a * 0x9E3779B97F4A7C15 + b * 0xBF58476D1CE4E5B9 + 1) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def ram_of(qemu: int) -> Path:
    for descriptor in Path(f"/proc/{qemu}/fd").iterdir():
        if "memfd" in str(descriptor.readlink()) and descriptor.stat().st_size >= 128 << 20:
            return descriptor
    raise AssertionError("the guest's memory is not a memfd")


async def test_the_dirtier_sees_a_changed_word(fleet: Fleet, guests: Guests) -> None:
    guest = await asyncio.to_thread(guests.create, "g1", "h1", disks=())
    inside = control(fleet, guest)
    await inside.dirty(16, 30)
    await poll(lambda: dirtier_passed(inside, 3))
    assert (await inside.dirty(8, 20)).bad_pages == 0
    with ram_of(guests.qemu_pid("g1")).open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        at = memory.find(struct.pack("<Q", mix(1000, 50)))
        assert at >= 0
        memory[at] ^= 1
    assert (await inside.dirty_off()).bad_pages == 1
