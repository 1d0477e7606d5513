"""QEMU's process is found by libvirt's pid file, and killed only if it is the guest's."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from handoff_agent.qemu_process import kill_qemu

GUEST = str(uuid.uuid4())


@pytest.fixture
def hung() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the guest that is stopped."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "-uuid", GUEST])
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("folder", ["qemu", "qemu/run"])
def test_one_that_hangs_is_killed(hung: subprocess.Popen[bytes], tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "web.pid").write_text(f"{hung.pid}\n")
    assert kill_qemu(f"qemu+unix:///system?socket={tmp_path}/libvirt-sock", "web", GUEST)
    assert hung.wait(1) == -signal.SIGKILL


def test_who_has_the_pid_now_is_left_alone(hung: subprocess.Popen[bytes], tmp_path: Path) -> None:
    uri = f"qemu+unix:///system?socket={tmp_path}/libvirt-sock"
    (tmp_path / "qemu").mkdir()
    pid_file = tmp_path / "qemu" / "web.pid"
    pid_file.write_text(str(hung.pid))
    assert not kill_qemu(uri, "web", str(uuid.uuid4()))
    pid_file.write_text("not a number")
    assert not kill_qemu(uri, "web", GUEST)
    assert not kill_qemu(uri, "db", GUEST)
    assert hung.poll() is None
