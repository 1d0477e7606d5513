"""Mirrors between real storage daemons, of both releases: only data crosses the wire, and the copy stays sparse."""

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from ports import port

from handoff_agent.disks import images
from handoff_agent.disks.mirror import JobInfo, Mirror
from handoff_agent.disks.nodes import parse_node
from handoff_agent.disks.storage_daemon import Address, Export, StorageDaemon, find_binary
from handoff_agent.disks.uris import ExportUri, parse_uri
from handoff_agent.local_sockets import listens
from handoff_agent.monitor import Json, QmpError
from handoff_common.errors import ExhaustedError, InvalidArgumentError, PreconditionError

PREFIX = os.environ.get("HANDOFF_PREFIX", "/opt/handoff")
EMULATORS = {"10.0": f"{PREFIX}/qemu-10.0/bin/qemu-system-x86_64", "7.2": "/usr/bin/qemu-system-x86_64"}
MIB = 1 << 20
SIZE_MIB, DATA_MIB, ZEROS_MIB = 192, 16, 48
ADDRESS = Address("127.0.0.1", port(100), port(107))


class Qemu:
    """A process with a block layer, as `Executes`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def execute(self, command: str, arguments: Mapping[str, Json] | None = None) -> Json:
        message: dict[str, Json] = {"execute": command}
        if arguments:
            message["arguments"] = arguments
        self._writer.write(json.dumps(message).encode())
        async with asyncio.timeout(20):
            while True:
                reply = json.loads(await self._reader.readline())
                if "error" in reply:
                    raise QmpError(command, reply["error"]["class"], reply["error"]["desc"])
                if "return" in reply:
                    return reply["return"]


@asynccontextmanager
async def source_qemu(binary: str, path: Path, image_format: str) -> AsyncIterator[Qemu]:
    """Has the image as its node "disk"."""
    socket = path.parent / "source-qmp"
    file: dict[str, Json] = {"driver": "file", "filename": str(path)}
    is_daemon = "storage-daemon" in binary
    as_qemu = () if is_daemon else ("-machine", "none", "-nodefaults", "-display", "none")
    monitor = ("--monitor", "chardev=q") if is_daemon else ("-mon", "chardev=q,mode=control")
    process = await asyncio.create_subprocess_exec(
        *(binary, *as_qemu, "--chardev", f"socket,id=q,path={socket},server=on,wait=off", *monitor),
        *("--blockdev", json.dumps({"driver": image_format, "node-name": "disk", "file": file})),
    )
    try:
        async with asyncio.timeout(20):
            while not listens(str(socket)):  # noqa: ASYNC110 - a file system has no event for it
                await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_unix_connection(str(socket), limit=1 << 22)
        qemu = Qemu(reader, writer)
        await reader.readline()
        await qemu.execute("qmp_capabilities")
        yield qemu
        writer.close()
    finally:
        process.kill()
        await process.wait()


class Wire:
    """Counts what goes through it to an export, and can be cut."""

    def __init__(self, export: ExportUri) -> None:
        self.bytes = 0
        self.stuck = False
        self._export = export
        self._writers: list[asyncio.StreamWriter] = []

    @asynccontextmanager
    async def open(self) -> AsyncIterator[ExportUri]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield ExportUri("127.0.0.1", server.sockets[0].getsockname()[1], self._export.name)
            for writer in self._writers:
                writer.close()

    async def idle(self) -> None:
        """Until something went through it, and nothing is on its way."""
        async with asyncio.timeout(20):
            before = -1
            while self.bytes == 0 or self.bytes != before:
                before = self.bytes
                await asyncio.sleep(0.1)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._export.host, self._export.port)
        self._writers += [writer, far_writer]
        await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer), return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            while self.stuck:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            self.bytes += len(data)
            writer.write(data)
            await writer.drain()
        writer.close()


async def until(mirror: Mirror, *, concluded: bool = False) -> JobInfo:
    async with asyncio.timeout(60):
        while True:
            job = await mirror.look()
            assert job is not None
            if job.concluded or (job.ready and not concluded):
                return job
            await asyncio.sleep(0.02)


def make_image(path: Path, image_format: str) -> None:
    images.create(str(path), image_format, SIZE_MIB * MIB)
    writes = ["-c", f"write -P 7 4M {DATA_MIB}M", "-c", f"write -P 0 64M {ZEROS_MIB}M"]
    subprocess.run(["qemu-io", "-f", image_format, *writes, str(path)], check=True, stdout=subprocess.DEVNULL)


def same(one: Path, two: Path) -> bool:
    return subprocess.run(["qemu-img", "compare", "-q", str(one), str(two)], check=False).returncode == 0


@pytest.fixture
def daemon(tmp_path: Path) -> StorageDaemon:
    return StorageDaemon(tmp_path / "run" / "m1" / "images", ThreadPoolExecutor(1))


@pytest.mark.parametrize("release", EMULATORS)
@pytest.mark.parametrize("formats", ["raw-raw", "raw-qcow2", "qcow2-raw", "qcow2-qcow2"])
async def test_only_data_crosses_the_wire(tmp_path: Path, daemon: StorageDaemon, release: str, formats: str) -> None:
    from_format, _, to_format = formats.partition("-")
    source, target = tmp_path / f"source.{from_format}", tmp_path / f"target.{to_format}"
    make_image(source, from_format)
    images.create(str(target), to_format, SIZE_MIB * MIB)
    binary = find_binary(EMULATORS[release])
    export = Export("m1-vda", str(target), to_format, writable=True)
    wire = Wire(parse_uri((await daemon.start(binary, [export], ADDRESS))["m1-vda"]))
    async with source_qemu(binary, source, from_format) as qemu, wire.open() as uri:
        mirror = Mirror(qemu, "vda")
        await mirror.connect(uri)
        await mirror.begin("disk", speed_bytes_per_s=0, write_blocking=False)
        await mirror.connect(uri)
        await mirror.begin("disk", speed_bytes_per_s=0, write_blocking=False)
        await until(mirror)
        can_change = await mirror.block_writes()
        assert can_change == (release != "7.2")
        await mirror.complete()
        await mirror.complete()
        assert await mirror.look() is None
    await daemon.stop()
    assert not (tmp_path / "run" / "m1").exists()
    compared = await asyncio.create_subprocess_exec("qemu-img", "compare", str(source), str(target))
    assert await compared.wait() == 0
    assert wire.bytes <= 1.02 * DATA_MIB * MIB
    # Tables of qcow2 are 0.4 MiB.
    assert target.stat().st_blocks * 512 <= (DATA_MIB + 0.5) * MIB


@pytest.mark.parametrize("idle", [True, False], ids=["idle", "busy"])
async def test_a_mirror_that_is_given_up_leaves_nothing(tmp_path: Path, daemon: StorageDaemon, *, idle: bool) -> None:
    """On a link that is dead as well, whether or not QEMU waits for an answer as it dies."""
    source, target = tmp_path / "source.raw", tmp_path / "target.raw"
    make_image(source, "raw")
    images.create(str(target), "raw", SIZE_MIB * MIB)
    binary = find_binary(EMULATORS["10.0"])
    uris = await daemon.start(binary, [Export("m1-vda", str(target), "raw", writable=True)], ADDRESS)
    wire = Wire(parse_uri(uris["m1-vda"]))
    async with source_qemu(EMULATORS["10.0"], source, "raw") as qemu, wire.open() as uri:
        mirror = Mirror(qemu, "vda")
        await mirror.connect(uri)
        await mirror.begin("disk", speed_bytes_per_s=MIB, write_blocking=False)
        with pytest.raises(PreconditionError, match="not in step"):
            await mirror.complete()
        if idle:
            await wire.idle()
        wire.stuck = True
        await mirror.cancel()
        await mirror.cancel()
        assert await mirror.look() is None
        nodes = await qemu.execute("query-named-block-nodes")
        assert isinstance(nodes, list)
        assert not [node for node in nodes if "handoff" in node["node-name"]]
        wire.stuck = False
    await daemon.stop()


async def test_a_destination_that_goes_away_is_told(tmp_path: Path, daemon: StorageDaemon) -> None:
    source, target = tmp_path / "source.raw", tmp_path / "target.raw"
    make_image(source, "raw")
    images.create(str(target), "raw", SIZE_MIB * MIB)
    binary = find_binary(EMULATORS["10.0"])
    uris = await daemon.start(binary, [Export("m1-vda", str(target), "raw", writable=True)], ADDRESS)
    async with source_qemu(binary, source, "raw") as qemu:
        mirror = Mirror(qemu, "vda")
        await mirror.connect(parse_uri(uris["m1-vda"]))
        await mirror.begin("disk", speed_bytes_per_s=4 * MIB, write_blocking=False)
        await daemon.stop()
        job = await until(mirror, concluded=True)
        assert job.error
        with pytest.raises(PreconditionError, match="vda could not be copied"):
            await mirror.complete()
        assert await mirror.look() is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DATA_MIB // 2}m", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("to_format", ["raw", "qcow2"])
@pytest.mark.parametrize("write_blocking", [False, True], ids=["background", "write-blocking"])
async def test_a_destination_that_gets_full_is_told_and_the_source_does_not_care(
    tmp_path: Path, small_disk: Path, daemon: StorageDaemon, to_format: str, *, write_blocking: bool
) -> None:
    source, target = tmp_path / "source.raw", small_disk / "target"
    make_image(source, "raw")
    images.create(str(target), to_format, SIZE_MIB * MIB)
    binary = EMULATORS["10.0"]
    export = Export("m1-vda", str(target), to_format, writable=True)
    uri = parse_uri((await daemon.start(find_binary(binary), [export], ADDRESS))["m1-vda"])
    async with source_qemu(binary, source, "raw") as qemu:
        mirror = Mirror(qemu, "vda")
        await mirror.connect(uri)
        await mirror.begin("disk", speed_bytes_per_s=0, write_blocking=write_blocking)
        assert (await until(mirror, concluded=True)).error == "No space left on device"
        line = 'qemu-io disk "write -P 9 5M 1M"'
        assert not await qemu.execute("human-monitor-command", {"command-line": line})
        await mirror.cancel()
        assert await mirror.look() is None
    await daemon.stop()


async def test_a_daemon_is_found_again_and_its_port_is_its_own(tmp_path: Path, daemon: StorageDaemon) -> None:
    path = tmp_path / "a.raw"
    images.create(str(path), "raw", MIB)
    binary = find_binary(EMULATORS["10.0"])
    export = Export("a", str(path), "raw", writable=False)
    only = Address("127.0.0.1", port(108), port(108))
    uris = await daemon.start(binary, [export], only)
    assert uris == {"a": f"nbd://127.0.0.1:{port(108)}/a"}
    again = StorageDaemon(tmp_path / "run" / "m1" / "images", ThreadPoolExecutor(1))
    assert again.pid == daemon.pid is not None
    other = StorageDaemon(tmp_path / "run" / "m2" / "images", ThreadPoolExecutor(1))
    with pytest.raises(ExhaustedError, match="no free port"):
        await other.start(binary, [export], only)
    await again.stop()
    assert daemon.pid is None
    with pytest.raises(PreconditionError, match="qemu-storage-daemon"):
        await other.start(binary, [Export("b", str(tmp_path / "none"), "raw", writable=False)], ADDRESS)
    assert not list((tmp_path / "run").iterdir())


def test_nodes_and_uris_are_read() -> None:
    node = parse_node(
        {
            "node-name": "libvirt-1-format",
            "image": {
                "filename": "/top",
                "format": "qcow2",
                "virtual-size": 100,
                "actual-size": 3,
                "cluster-size": 65536,
                "snapshots": [{}],
                "backing-image": {"filename": "/base", "format": "raw", "virtual-size": 100, "actual-size": 4},
            },
        }
    )
    assert (node.name, node.allocated_bytes, node.backing, node.snapshots) == ("libvirt-1-format", 7, ("/base",), 1)
    for uri in ("nbd://10.20.0.2:49153/m-vda", "nbd://[fe80::1]:1/x"):
        assert str(parse_uri(uri)) == uri
    for wrong in ("", "nbd://h/x", "http://h:1/x", "nbd://h:1/", "nbd://h:x/y"):
        with pytest.raises(InvalidArgumentError):
            parse_uri(wrong)


def certify(folder: Path, address: str) -> Path:
    """Credentials of one host by a CA of their own, in QEMU's names."""
    folder.mkdir()

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    openssl("req", "-x509", *new, "-subj", "/CN=fleet", "-keyout", "ca-key.pem", "-out", "ca-cert.pem")
    for role in ("server", "client"):
        extensions = ("-addext", f"subjectAltName=IP:{address}", "-addext", "basicConstraints=critical,CA:FALSE")
        signed = ("-x509", "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem")
        files = ("-keyout", f"{role}-key.pem", "-out", f"{role}-cert.pem")
        openssl("req", *signed, *new, *extensions, "-subj", "/CN=h1", *files)
    return folder


async def test_a_mirror_by_tls_is_for_those_with_a_certificate(tmp_path: Path, daemon: StorageDaemon) -> None:
    ours, others = certify(tmp_path / "tls", ADDRESS.host), certify(tmp_path / "others", ADDRESS.host)
    source, target = tmp_path / "source.raw", tmp_path / "target.raw"
    make_image(source, "raw")
    images.create(str(target), "raw", SIZE_MIB * MIB)
    binary = EMULATORS["10.0"]
    export = Export("m1-vda", str(target), "raw", writable=True)
    uris = await daemon.start(find_binary(binary), [export], ADDRESS, tls_credentials=str(ours))
    assert uris["m1-vda"].startswith("nbds://")
    uri = parse_uri(uris["m1-vda"])
    async with source_qemu(binary, source, "raw") as qemu:
        for credentials in ("", str(others)):
            stranger = Mirror(qemu, "vda", tls_credentials=credentials)
            with pytest.raises(QmpError):
                await stranger.connect(uri)
                await stranger.begin("disk", speed_bytes_per_s=0, write_blocking=False)
            assert await stranger.look() is None
        mirror = Mirror(qemu, "vda", tls_credentials=str(ours))
        await mirror.connect(uri)
        await mirror.begin("disk", speed_bytes_per_s=0, write_blocking=False)
        await until(mirror)
        await mirror.complete()
        left = await qemu.execute("qom-list", {"path": "/objects"})
        assert "tls" not in json.dumps(left)
    await daemon.stop()
    assert same(source, target)
