"""An agent that is killed leaves none of the processes behind that work for it alone."""

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest
from ports import port

PROBE = (
    "from handoff_agent.emulators import Emulators; from handoff_agent.settings import EmulatorSettings;"
    " work = Emulators([EmulatorSettings(name='a', path=sys.argv[1])]).probe()"
)
REBASE = "from handoff_agent.disks.qemu_img import qemu_img; work = qemu_img('rebase')"

EXPORT = (
    "from concurrent.futures import ThreadPoolExecutor; from pathlib import Path;"
    " from handoff_agent.disks.storage_daemon import Address, StorageDaemon;"
    " daemon = StorageDaemon(Path(sys.argv[1]).with_name('run'), ThreadPoolExecutor(1));"
    f" work = daemon.start(sys.argv[1], [], Address('127.0.0.1', {port(109)}, {port(109)}))"
)


@pytest.mark.parametrize(
    "work", [PROBE, REBASE, EXPORT], ids=["a QEMU that is asked", "qemu-img", "a storage daemon that is not one yet"]
)
def test_it_ends_with_the_agent(tmp_path: Path, work: str) -> None:
    told, child = tmp_path / "pid", tmp_path / "qemu-img"
    os.mkfifo(told)
    child.write_text(f"#!/bin/sh\necho $$ >{told}\nexec sleep 600\n")
    child.chmod(0o755)
    script = f"import asyncio, sys; {work}; asyncio.run(work)"
    path = f"{tmp_path}:{os.environ['PATH']}"
    with subprocess.Popen([sys.executable, "-c", script, str(child)], env={**os.environ, "PATH": path}) as agent:
        handle = os.pidfd_open(int(told.read_text()))
        agent.kill()
    try:
        assert select.select([handle], [], [], 10)[0]
    finally:
        os.close(handle)
