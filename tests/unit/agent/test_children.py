"""An agent that is killed leaves none of the processes behind that work for it alone."""

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = (
    "from handoff_agent.emulators import Emulators; from handoff_agent.settings import EmulatorSettings;"
    " work = Emulators([EmulatorSettings(name='a', path=sys.argv[1])]).probe()"
)
REBASE = "from handoff_agent.disks.qemu_img import qemu_img; work = qemu_img('rebase')"


@pytest.mark.parametrize("work", [PROBE, REBASE], ids=["a QEMU that is asked", "qemu-img"])
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
