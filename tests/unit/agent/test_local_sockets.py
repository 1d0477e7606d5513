"""The sockets between two QEMUs of one host."""

import socket
from pathlib import Path

from handoff_agent.local_sockets import listens


def test_a_socket_listens_from_then_on_not_from_when_its_file_is_there(tmp_path: Path) -> None:
    path = str(tmp_path / "cpr")
    with socket.socket(socket.AF_UNIX) as bound:
        assert not listens(path)
        bound.bind(path)
        assert not listens(path)
        bound.listen()
        assert listens(path)
    assert not listens(path)
