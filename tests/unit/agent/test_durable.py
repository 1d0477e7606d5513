"""Files are replaced whole, and can be when the disk is full."""

import errno
import os
from pathlib import Path

import pytest

from handoff_agent import durable
from handoff_agent.durable import SPARE_BYTES, DurableFolder


class FullDisk:
    """No file can be made, or get longer than it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        real = durable._write

        def write(path: Path, data: bytes, flags: int) -> None:
            if self.full and (not path.exists() or flags & os.O_TRUNC or len(data) > path.stat().st_size):
                if flags & os.O_CREAT:
                    path.touch()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(path, data, flags)

        monkeypatch.setattr(durable, "_write", write)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    return FullDisk(monkeypatch)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_replaced(tmp_path: Path) -> None:
    folder = DurableFolder(tmp_path, spares=2)
    for text in ("longer at first", "then short"):
        folder.replace(tmp_path / "a.json", text)
    assert (tmp_path / "a.json").read_text() == "then short"
    assert names(tmp_path) == {"a.json", "spare-0", "spare-1"}


def test_a_full_disk_has_room_for_as_many_as_there_are_spares(tmp_path: Path, disk: FullDisk) -> None:
    folder = DurableFolder(tmp_path, spares=2)
    disk.full = True
    for number in range(2):
        folder.replace(tmp_path / f"{number}.json", f"record {number}")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0.json": "record 0", "1.json": "record 1"}
    with pytest.raises(OSError, match="No space"):
        folder.replace(tmp_path / "0.json", "no more")
    assert (tmp_path / "0.json").read_text() == "record 0"
    assert names(tmp_path) == {"0.json", "1.json"}


def test_spares_are_laid_ready_again(tmp_path: Path, disk: FullDisk) -> None:
    folder = DurableFolder(tmp_path, spares=2)
    disk.full = True
    folder.replace(tmp_path / "a.json", "on a full disk")
    disk.full = False
    folder.replace(tmp_path / "a.json", "with room again")
    assert names(tmp_path) == {"a.json", "spare-0", "spare-1"}
    assert {(tmp_path / f"spare-{number}").stat().st_size for number in range(2)} == {SPARE_BYTES}


def test_a_full_disk_at_the_start_is_no_failure(tmp_path: Path, disk: FullDisk) -> None:
    disk.full = True
    DurableFolder(tmp_path, spares=2)
    assert names(tmp_path) == set()
