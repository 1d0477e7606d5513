"""What runs on the lab's storage host: serves handoff.storage.v1, and makes the access lists come true.

Each volume that anyone may open has its own qemu-nbd, on its own port. iptables lets a port be reached from those hosts
only; a host that is shut out has its connections closed as well. The records are files, so that a restart of this
daemon, or of the whole node, changes nothing.
"""

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from handoff.storage.v1 import access_pb2 as pb
from handoff.storage.v1 import access_pb2_grpc
from handoff_common.errors import HandoffError, NotFoundError, PreconditionError, UnavailableError
from handoff_common.logs import configure_logs
from handoff_common.server import Context, Server, until_stopped
from handoff_lab.errors import LabError
from handoff_lab.fabric import STORAGE_NET
from handoff_lab.host import host_index
from handoff_lab.storage import FIRST_PORT, LAST_PORT, VolumeFile, read_volumes, write_volume

COMMAND_S = 10.0
RUN = Path("/run/handoff-volumes")
SERVICE = "handoff.storage.v1.VolumeAccessService"
# Two QEMUs during a move, a third for whoever looks; qemu-nbd's default is one.
CLIENTS = "8"


def address_of(host: str) -> str:
    """A host's address on the storage network. Raises NotFoundError when there is no such host."""
    try:
        return f"{STORAGE_NET}.{host_index(host)}"
    except LabError as error:
        raise NotFoundError(str(error)) from None


def firewall(volumes: list[VolumeFile]) -> str:
    """Every rule, as iptables-restore takes them. A refused host is told at once, rather than left waiting."""
    rules = [
        f"-A INPUT -p tcp --dport {volume.port} -s {address_of(host)} -j ACCEPT"
        for volume in volumes
        for host in volume.hosts
    ]
    rules.append(f"-A INPUT -p tcp --dport {FIRST_PORT}:{LAST_PORT} -j REJECT --reject-with tcp-reset")
    return "\n".join(["*filter", ":INPUT ACCEPT [0:0]", *rules, "COMMIT", ""])


def run(*command: str, stdin: str = "") -> None:
    """Runs a command. Raises UnavailableError when it fails or takes too long."""
    try:
        done = subprocess.run(
            command, input=stdin, text=True, capture_output=True, timeout=COMMAND_S, check=False, cwd="/"
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{command[0]} did not end within {COMMAND_S:g} s") from None
    if done.returncode != 0:
        raise UnavailableError(f"{' '.join(command)}: {done.stderr.strip()}")


class Exports:
    """The volumes of one directory, their servers, and the rules for them. Used by one thread at a time."""

    def __init__(self, directory: Path, address: str) -> None:
        self._directory = directory
        self._address = address

    def grant(self, name: str, host: str) -> None:
        """Lets the host in. Raises NotFoundError, UnavailableError."""
        address_of(host)
        volume = self._volume(name)
        write_volume(self._directory, replace(volume, hosts=tuple({*volume.hosts, host})))
        self.enforce()

    def revoke(self, name: str, host: str) -> None:
        """Shuts the host out. Raises NotFoundError, UnavailableError."""
        volume = self._volume(name)
        write_volume(self._directory, replace(volume, hosts=tuple({*volume.hosts} - {host})))
        self.enforce()
        # What came in before the rule would still be written.
        run("ss", "-HKtn", "dst", address_of(host), "sport", "=", f":{volume.port}")

    def enforce(self) -> list[VolumeFile]:
        """Makes rules and servers what the records say, and returns these. Raises UnavailableError."""
        volumes = read_volumes(self._directory)
        run("iptables-restore", "-w", stdin=firewall(volumes))
        for volume in volumes:
            if volume.hosts and self._server(volume.name) is None:
                self._serve(volume)
        for pid_file in RUN.glob("*.pid"):
            pid = self._server(pid_file.stem)
            if pid is not None and pid_file.stem not in {volume.name for volume in volumes}:
                os.kill(pid, signal.SIGKILL)
                pid_file.unlink()
        return volumes

    def _serve(self, volume: VolumeFile) -> None:
        run(
            *("qemu-nbd", "--fork", "--persistent", "--shared", CLIENTS, "--pid-file", str(RUN / f"{volume.name}.pid")),
            *("--format=raw", "--cache=none", "--aio=native", "--discard=unmap", "--detect-zeroes=unmap"),
            *("--export-name", volume.name, "--bind", self._address, "--port", str(volume.port)),
            str(self._directory / f"{volume.name}.raw"),
        )

    def _volume(self, name: str) -> VolumeFile:
        for volume in read_volumes(self._directory):
            if volume.name == name:
                return volume
        raise NotFoundError(f"there is no volume {name!r} on this storage host")

    def _server(self, name: str) -> int | None:
        try:
            pid = int((RUN / f"{name}.pid").read_text())
            return pid if "qemu-nbd" in Path(f"/proc/{pid}/cmdline").read_text() else None
        except (FileNotFoundError, ValueError):
            return None


class Access(access_pb2_grpc.VolumeAccessServiceServicer):
    """The service."""

    def __init__(self, exports: Exports) -> None:
        self._exports = exports
        self._lock = asyncio.Lock()
        self._latest: dict[tuple[str, str], int] = {}
        """The revision of the last request for a volume and a host. What was on its way ends with this daemon."""

    async def GrantAccess(self, request: pb.GrantAccessRequest, context: Context) -> pb.GrantAccessResponse:  # noqa: N802
        """See access.proto."""
        async with self._lock:
            self._note(request)
            await asyncio.to_thread(self._exports.grant, request.volume.name, request.host)
        return pb.GrantAccessResponse()

    async def RevokeAccess(self, request: pb.RevokeAccessRequest, context: Context) -> pb.RevokeAccessResponse:  # noqa: N802
        """See access.proto."""
        async with self._lock:
            self._note(request)
            await asyncio.to_thread(self._exports.revoke, request.volume.name, request.host)
        return pb.RevokeAccessResponse()

    def _note(self, request: pb.GrantAccessRequest | pb.RevokeAccessRequest) -> None:
        """Raises PreconditionError for a request that comes after a later one."""
        about = request.volume.name, request.host
        if 0 < request.revision < self._latest.get(about, 0):
            raise PreconditionError(f"{about[0]} for {about[1]}: revision {request.revision} comes too late")
        self._latest[about] = max(request.revision, self._latest.get(about, 0))

    async def ListAccess(self, request: pb.ListAccessRequest, context: Context) -> pb.ListAccessResponse:  # noqa: N802
        """See access.proto."""
        async with self._lock:
            volumes = await asyncio.to_thread(self._exports.enforce)
        found = [one for one in volumes if request.name in ("", one.name)]
        return pb.ListAccessResponse(lists=[pb.AccessList(name=one.name, hosts=sorted(one.hosts)) for one in found])


async def serve(exports: Exports, listen: list[str]) -> None:
    """Serves until SIGTERM."""
    server = Server((SERVICE,))
    access_pb2_grpc.add_VolumeAccessServiceServicer_to_server(Access(exports), server.grpc_server)
    await server.start(listen)
    try:
        await until_stopped()
    finally:
        await server.stop()


def main(directory: str, address: str, *listen: str) -> None:
    """Makes the records true, and serves."""
    configure_logs("json", "info")
    RUN.mkdir(parents=True, exist_ok=True)
    try:
        exports = Exports(Path(directory), address)
        exports.enforce()
        asyncio.run(serve(exports, list(listen)))
    except HandoffError as error:
        sys.exit(f"storage: {error.message}")


if __name__ == "__main__":
    main(*sys.argv[1:])
