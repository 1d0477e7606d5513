"""Makes the images of a guest's disks: sparse, with as much data and as many written zeros as was asked for."""

import contextlib
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from handoff_lab.errors import LabError
from handoff_lab.nbd import NbdClient, connect_unix
from handoff_lab.node import base_environment, wait_for
from handoff_lab.pattern import MIB, Content, Pattern

DEADLINE_S = 600.0
READY_S = 20.0
REQUEST_S = 60.0
# QEMU's NBD server takes 32 MiB a request; each is a round trip.
ZEROS_AT_ONCE = 16 * MIB


def make_image(path: Path, image_format: str, pattern: Pattern, backing: Path | None = None) -> None:
    """Makes a new image, as seen from here. `backing` lies in the same directory and is named without it.

    Raises LabError, also when the file exists.
    """
    if path.exists():
        raise LabError(f"{path} exists already")
    behind = ["-b", backing.name, "-F", backing.suffix.removeprefix(".")] if backing else []
    _run(["qemu-img", "create", "-q", "-f", image_format, *behind, path.name, f"{pattern.size_mib}M"], path.parent)
    if pattern.data_mib + pattern.zeros_mib == 0:
        return
    if image_format == "raw":
        with path.open("r+b", buffering=0) as file:

            def write(offset: int, data: bytes | bytearray) -> None:
                file.seek(offset)
                file.write(data)

            _fill(pattern, write)
    else:
        _fill_through_nbd(path, image_format, pattern)


def _fill(pattern: Pattern, write: Callable[[int, bytes | bytearray], None]) -> None:
    blocks = pattern.data()
    for extent in pattern.extents():
        match extent.content:
            case Content.DATA:
                for offset in range(extent.start, extent.end, MIB):
                    write(offset, blocks.at(offset))
            case Content.ZEROS:
                for offset in range(extent.start, extent.end, ZEROS_AT_ONCE):
                    write(offset, bytes(min(ZEROS_AT_ONCE, extent.end - offset)))
            case Content.HOLE:
                pass


def _fill_through_nbd(path: Path, image_format: str, pattern: Pattern) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        socket = Path(scratch) / "nbd"
        command = ["qemu-nbd", "-f", image_format, "--cache=unsafe", "-k", str(socket), str(path)]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=base_environment())
        try:
            with _connected(str(socket), server) as client:
                _fill(pattern, client.write)
            # Its last client is gone: it ends by itself, after it has written everything.
            server.wait(DEADLINE_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LabError(f"{path} could not be filled: {error}") from error
        finally:
            server.kill()
            _, complaint = server.communicate()
        if server.returncode != 0:
            raise LabError(f"{path} could not be filled: {complaint.strip()}")


def _connected(path: str, server: subprocess.Popen[str]) -> NbdClient:
    clients: list[NbdClient] = []

    def connect() -> bool:
        # The socket's file is there a moment before it listens.
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            clients.append(connect_unix(path, "", REQUEST_S))
        return bool(clients) or server.poll() is not None

    wait_for(connect, READY_S, "an NBD server for the new image")
    return clients[0] if clients else connect_unix(path, "", REQUEST_S)


def _run(command: list[str], directory: Path) -> None:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env=base_environment(),
        check=False,
        cwd=directory,
    )
    if done.returncode != 0:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip()}")
