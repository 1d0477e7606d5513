"""A real libvirtd of the tests' own, in a private mount namespace."""

import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from handoff_agent.events import start_libvirt_loop

LIBVIRTD_CONF = """
host_uuid = "{host_uuid}"
auth_unix_rw = "none"
log_outputs = "2:file:{root}/log/libvirtd.log"
"""
QEMU_CONF = """
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
remember_owner = 0
"""
BINDS = {
    "run": "/run/libvirt",
    "etc": "/etc/libvirt",
    "lib": "/var/lib/libvirt",
    "log": "/var/log/libvirt",
    "cache": "/var/cache/libvirt",
}


@contextmanager
def running_libvirtd(root: Path) -> Iterator[str]:
    """Its URI. `root`: an empty folder for what it keeps."""
    for name in BINDS:
        (root / name).mkdir()
    (root / "etc" / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(host_uuid=uuid.uuid4(), root=root))
    (root / "etc" / "qemu.conf").write_text(QEMU_CONF)
    binds = "\n".join(f"mkdir -p {target}; mount --bind {root}/{name} {target}" for name, target in BINDS.items())
    # bash as PID 1 reaps QEMU at once; libvirt waits for that, and the machine's own init may be slow.
    script = f"set -e; mount --make-rprivate /\n{binds}\nlibvirtd -p {root}/run/libvirtd.pid & wait $!"
    # It ends with the test run, also one that is killed.
    alone = ("setpriv", "--pdeathsig", "KILL", "unshare", "-m", "-p", "-f", "--kill-child", "--mount-proc")
    daemon = subprocess.Popen([*alone, "bash", "-c", script], stdin=subprocess.DEVNULL)
    path = root / "run" / "libvirt-sock"
    uri = f"qemu+unix:///system?socket={path}"
    try:
        deadline = time.monotonic() + 30
        while not _accepts(path):
            assert daemon.poll() is None, "libvirtd ended"
            assert time.monotonic() < deadline, "libvirtd does not listen"
            time.sleep(0.05)
        start_libvirt_loop()
        yield uri
    finally:
        daemon.kill()  # its namespace ends with it, and every QEMU
        daemon.wait(20)


def _accepts(path: Path) -> bool:
    """Its file is there a moment before."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
