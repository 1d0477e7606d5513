"""Kills the QEMU of a domain that does not listen any more.

libvirt's destroy sends it SIGTERM, which a process that is stopped or stuck does not act on, and SIGKILL only 10 s
later (virProcessKillPainfully). A guest may be waiting for that.
"""

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit

END_TIMEOUT_S: Final = 1.0
_DEFAULT_SOCKET: Final = "/run/libvirt/libvirt-sock"
# Below the folder of libvirtd's socket; of a system's daemon, and of a user's.
_PID_FOLDERS: Final = ("qemu", "qemu/run")


def kill_qemu(uri: str, name: str, uuid: str) -> bool:
    """Kills it, and waits for its end for 1 s at the most (blocking); tells whether it has ended.

    `uri`: of its libvirtd, whose pid file tells which process it is. False where there is none: libvirt has to do it.
    """
    for path in _pid_files(uri, name):
        with contextlib.suppress(OSError, ValueError), _opened(int(path.read_text())) as (pid, handle):
            # A pid file outlives its process: the pid may be anybody's.
            if uuid.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                return bool(select.select([handle], [], [], END_TIMEOUT_S)[0])
    return False


def _pid_files(uri: str, name: str) -> Iterator[Path]:
    [socket] = parse_qs(urlsplit(uri).query).get("socket", [_DEFAULT_SOCKET])
    for folder in _PID_FOLDERS:
        yield Path(socket).parent / folder / f"{name}.pid"


@contextlib.contextmanager
def _opened(pid: int) -> Iterator[tuple[int, int]]:
    handle = os.pidfd_open(pid)
    try:
        yield pid, handle
    finally:
        os.close(handle)
