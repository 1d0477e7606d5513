"""Connections of other processes are broken from outside."""

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from handoff_agent.channels import LocalChannels

HANGS = """
import socket, sys, time
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
listening.listen()
print("listens", flush=True)
accepted = [listening.accept() for _ in range(2)]
print("accepted", flush=True)
time.sleep(60)
"""


def test_one_who_writes_to_a_process_that_hangs_is_freed(tmp_path: Path) -> None:
    path = str(tmp_path / "main")
    hangs = subprocess.Popen([sys.executable, "-c", HANGS, path], stdout=subprocess.PIPE, text=True)
    try:
        assert hangs.stdout is not None
        assert hangs.stdout.readline() == "listens\n"
        broken = []

        def write() -> None:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(path)
                with pytest.raises(OSError, match="Broken pipe"):
                    while True:
                        connection.sendall(bytes(1 << 20))
                broken.append(True)

        writers = [threading.Thread(target=write) for _ in range(2)]
        for writer in writers:
            writer.start()
        assert hangs.stdout.readline() == "accepted\n"
        LocalChannels(path).cut()
        for writer in writers:
            writer.join(10)
        assert broken == [True, True]
    finally:
        hangs.kill()
        hangs.wait()


def test_nothing_to_cut(tmp_path: Path) -> None:
    LocalChannels(str(tmp_path / "main")).cut()
