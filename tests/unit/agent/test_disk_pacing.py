"""The bandwidth bounds what is sent: mirrors between real storage daemons."""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_mirror import ADDRESS, EMULATORS, MIB, Qemu, same, source_qemu, until

from handoff_agent.disks import flows, images
from handoff_agent.disks.mirror import Mirror
from handoff_agent.disks.pacing import Pacing, in_flight_bytes
from handoff_agent.disks.storage_daemon import Export, StorageDaemon, find_binary
from handoff_agent.disks.uris import ExportUri, parse_uri
from handoff_agent.monitor import Json

SIZE_MIB, DATA_MIB, ZEROS_MIB = 256, 24, 160
RATE_MIB_PER_S = 16


def write(path: Path, *writes: str) -> None:
    """Makes an image; `writes`: as qemu-io's."""
    images.create(str(path), "raw", SIZE_MIB * MIB)
    commands = [word for each in writes for word in ("-c", f"write {each}")]
    subprocess.run(["qemu-io", "-f", "raw", *commands, str(path)], check=True, stdout=subprocess.DEVNULL)


def make_image(path: Path) -> None:
    """Data, allocated zeros, data."""
    half = DATA_MIB // 2
    write(path, f"-P 7 0 {half}M", f"-P 0 {half}M {ZEROS_MIB}M", f"-P 9 {half + ZEROS_MIB}M {half}M")


@asynccontextmanager
async def mirrored(tmp_path: Path, threads: ThreadPoolExecutor) -> AsyncIterator[tuple[Qemu, Mirror, ExportUri]]:
    """A mirror that has begun, so slowly that next to nothing has been sent."""
    source, target = tmp_path / "source.raw", tmp_path / "target.raw"
    make_image(source)
    images.create(str(target), "raw", SIZE_MIB * MIB)
    binary = find_binary(EMULATORS["10.0"])
    daemon = StorageDaemon(tmp_path / "run" / "m1" / "images", threads)
    uris = await daemon.start(binary, [Export("m1-vda", str(target), "raw", writable=True)], ADDRESS)
    uri = parse_uri(uris["m1-vda"])
    async with source_qemu(binary, source, "raw") as qemu:
        mirror = Mirror(qemu, "vda")
        in_flight = in_flight_bytes(RATE_MIB_PER_S * MIB, 1)
        await mirror.connect(uri)
        await mirror.begin("disk", speed_bytes_per_s=1, write_blocking=False, in_flight_bytes=in_flight)
        yield qemu, mirror, uri
    await daemon.stop()
    assert same(source, target)


@dataclass(frozen=True, slots=True)
class Reading:
    """What was sent at some time between two, which are far apart when the test has to wait for a processor."""

    began_s: float
    sent_bytes: int
    ended_s: float


async def sent_until_ready(mirror: Mirror, uri: ExportUri) -> list[Reading]:
    """What the mirror has sent, again and again."""
    (flow,) = flows.find(uri.host, uri.port)
    samples: list[Reading] = []

    async def watch() -> None:
        while True:
            samples.append(Reading(time.monotonic(), flows.sent_bytes(flow), time.monotonic()))
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    await until(mirror)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    return samples


async def test_zeros_cost_no_bandwidth_and_data_behind_them_makes_no_burst(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as threads:
        async with mirrored(tmp_path, threads) as (_, mirror, uri):
            pacing = Pacing(threads)
            await pacing.begin([uri], RATE_MIB_PER_S * MIB)
            await mirror.set_speed(0)
            samples = await sent_until_ready(mirror, uri)
            await pacing.end([uri])
            await mirror.complete()
    # By the speed of the job it would take 11 s.
    assert samples[-1].ended_s - samples[0].began_s < 8
    for later in samples:
        for earlier in samples:
            if later.began_s - earlier.ended_s >= 1:
                most = 1.05 * RATE_MIB_PER_S * MIB * (later.ended_s - earlier.began_s)
                assert later.sent_bytes - earlier.sent_bytes <= most


async def test_what_one_disk_leaves_the_other_has(tmp_path: Path) -> None:
    """One has 4 MiB and then zeros, the other 76 MiB: by even shares it would take 9.5 s, not 5."""
    sources, targets = ([tmp_path / name for name in names] for names in (("a", "b"), ("a.copy", "b.copy")))
    write(sources[0], "-P 7 0 4M", "-P 0 4M 64M")
    write(sources[1], "-P 8 0 76M")
    for path in targets:
        images.create(str(path), "raw", SIZE_MIB * MIB)
    binary = find_binary(EMULATORS["10.0"])
    with ThreadPoolExecutor(1) as threads:
        daemon = StorageDaemon(tmp_path / "run" / "m1" / "images", threads)
        exports = [Export(path.name, str(path), "raw", writable=True) for path in targets]
        uris = [parse_uri(uri) for uri in (await daemon.start(binary, exports, ADDRESS)).values()]
        async with source_qemu(binary, sources[0], "raw") as qemu:
            file: dict[str, Json] = {"driver": "file", "filename": str(sources[1])}
            await qemu.execute("blockdev-add", {"driver": "raw", "node-name": "other", "file": file})
            mirrors = [Mirror(qemu, "vda"), Mirror(qemu, "vdb")]
            for mirror, node, uri in zip(mirrors, ("disk", "other"), uris, strict=True):
                await mirror.connect(uri)
                await mirror.begin(node, speed_bytes_per_s=1, write_blocking=False, in_flight_bytes=MIB)
            pacing = Pacing(threads)
            await pacing.begin(uris, RATE_MIB_PER_S * MIB)
            began_s = time.monotonic()
            for mirror in mirrors:
                await mirror.set_speed(0)
            jobs = [await mirror.look() for mirror in mirrors]
            while not all(job is not None and job.ready for job in jobs):
                assert time.monotonic() - began_s < 9
                await pacing.wait(0.2)
                jobs = [await mirror.look() for mirror in mirrors]
            assert time.monotonic() - began_s > 0.9 * (76 + 4) / RATE_MIB_PER_S - 0.3
            await pacing.settle()
            await pacing.end(uris)
            for mirror in mirrors:
                await mirror.complete()
        await daemon.stop()
    assert all(same(one, other) for one, other in zip(sources, targets, strict=True))


async def test_a_pace_that_another_agent_has_left_is_found_and_ends(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as threads:
        async with mirrored(tmp_path, threads) as (_, mirror, uri):
            await Pacing(threads).begin([uri], MIB)
            await mirror.set_speed(0)
            another = Pacing(threads)
            assert not another.on
            await another.end([uri])
            began_s = time.monotonic()
            await until(mirror)
            assert time.monotonic() - began_s < DATA_MIB / 2
            await mirror.complete()


async def test_what_is_not_connected_is_not_paced() -> None:
    with ThreadPoolExecutor(1) as threads:
        pacing = Pacing(threads)
        for host in ("127.0.0.1", "a.name"):
            nowhere = ExportUri(host, 1, "x")
            with pytest.raises(OSError, match=r"connections are found|does not appear"):
                await pacing.begin([nowhere], MIB)
        await pacing.wait(0.01)
        await pacing.settle()
        await pacing.end([ExportUri("127.0.0.1", 1, "x")])
        assert not pacing.on


CONNECTS = "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2]))); s.send(b'123'); input()"


@pytest.mark.parametrize(("listens", "connects"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1")])
def test_a_flow_is_found_in_another_process_and_told_apart_from_its_successor(listens: str, connects: str) -> None:
    family = socket.AF_INET6 if ":" in listens else socket.AF_INET
    with socket.create_server((listens, 0), family=family, dualstack_ipv6=listens == "::") as server:
        server.settimeout(20)
        port = server.getsockname()[1]
        process = subprocess.Popen([sys.executable, "-c", CONNECTS, connects, str(port)], stdin=subprocess.PIPE)
        accepted, _ = server.accept()
        assert accepted.recv(3) == b"123"
        (flow,) = flows.find(connects, port)
        assert flow.pid == process.pid
        assert flows.sent_bytes(flow) == len(b"123")
        flows.bound(flow, MIB)
        process.communicate(b"\n")
        accepted.close()
    with pytest.raises(OSError, match="No such process"):
        flows.bound(flow, 0)


def test_how_much_may_be_on_its_way() -> None:
    assert in_flight_bytes(50 * MIB, 1) == 10 * MIB
    assert in_flight_bytes(50 * MIB, 4) == 2 * MIB
    assert in_flight_bytes(4096 * MIB, 1) == 16 * MIB
    assert in_flight_bytes(50 * MIB, 11) == 0
    assert in_flight_bytes(4 * MIB, 1) == 0
    assert in_flight_bytes(0, 1) == 0
