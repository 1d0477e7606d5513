"""Image files: made, marked, removed, also by an agent that comes after one that died in between."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from handoff_agent.disks import images
from handoff_common.errors import PreconditionError

MIB = 1 << 20


class DeathError(Exception):
    """What is done ends here."""


def test_images(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    images.create(str(path), "qcow2", 3 * MIB, owner="root", cluster_bytes=4096)
    told = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", str(path)]))
    assert (told["virtual-size"], told["cluster-size"]) == (3 * MIB, 4096)
    with pytest.raises(PreconditionError, match="exists"):
        images.create(str(path), "raw", MIB)
    assert path.stat().st_size > 0
    with pytest.raises(PreconditionError, match="no user nobody-at-all"):
        images.create(str(tmp_path / "b"), "raw", MIB, owner="nobody-at-all")
    with pytest.raises(PreconditionError, match="No such file"):
        images.create(str(tmp_path / "no" / "b"), "raw", MIB)
    with pytest.raises(
        PreconditionError, match=f"^{tmp_path}/b: qemu-img: The image size is too large for file format"
    ):
        images.create(str(tmp_path / "b"), "qcow2", 1 << 62)
    assert [one.name for one in tmp_path.iterdir()] == ["a.qcow2"]
    found = images.look([str(path), str(tmp_path / "b"), str(tmp_path / "no" / "b")])
    assert [(facts.exists, facts.folder_exists) for facts in found.values()] == [
        (True, True),
        (False, True),
        (False, False),
    ]
    assert 0 < found[str(path)].free_bytes < shutil.disk_usage(tmp_path).total
    images.remove(str(path))
    images.remove(str(path))


@pytest.fixture
def marked(tmp_path: Path) -> tuple[Path, Path]:
    """An image's mark, and its path; neither is there."""
    path = tmp_path / "a.qcow2"
    mark = Path(images.mark_of(str(path), "m1", "vda"))
    assert mark.parent == path.parent
    return mark, path


def make(mark: Path, path: Path) -> None:
    images.create(str(mark), "qcow2", MIB, owner="root", base_uri="nbd://127.0.0.1:1/none")
    images.give_name(str(mark), str(path))


def test_an_image_that_stays_loses_its_mark(marked: tuple[Path, Path]) -> None:
    mark, path = marked
    make(mark, path)
    images.give_name(str(mark), str(path))
    for _ in range(2):
        images.remove(str(mark))
    images.remove_marked(str(mark), str(path))
    assert list(path.parent.iterdir()) == [path]
    assert subprocess.check_output(["qemu-img", "info", str(path)])


def nothing(mark: Path, path: Path) -> None:
    """It died before all."""


def half_an_image(mark: Path, path: Path) -> None:
    mark.write_bytes(b"QFI")


def image_without_name(mark: Path, path: Path) -> None:
    images.create(str(mark), "raw", MIB)


def image_whose_name_was_removed(mark: Path, path: Path) -> None:
    make(mark, path)
    unlink = Path.unlink

    def die_at_the_mark(self: Path, *, missing_ok: bool = False) -> None:
        if self == mark:
            raise DeathError
        unlink(self, missing_ok=missing_ok)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(DeathError):
        patch.setattr(Path, "unlink", die_at_the_mark)
        images.remove_marked(str(mark), str(path))
    assert mark.exists()
    assert not path.exists()


LEFT = [nothing, half_an_image, image_without_name, make, image_whose_name_was_removed]


@pytest.mark.parametrize("others", [False, True], ids=["alone", "beside-another"])
@pytest.mark.parametrize("left", LEFT)
def test_the_next_agent_removes_what_was_made_and_nothing_else(
    marked: tuple[Path, Path], left: Callable[[Path, Path], None], *, others: bool
) -> None:
    mark, path = marked
    left(mark, path)
    if others:  # also in the place of what was made
        path.unlink(missing_ok=True)
        path.write_text("another's")
    for _ in range(2):
        images.remove_marked(str(mark), str(path))
    assert [one.read_text() for one in path.parent.iterdir()] == ["another's"] * others


def test_a_file_that_appears_meanwhile_stays(marked: tuple[Path, Path]) -> None:
    mark, path = marked
    images.create(str(mark), "raw", MIB)
    path.write_text("another's")
    with pytest.raises(PreconditionError, match="exists; remove it"):
        images.give_name(str(mark), str(path))
    assert path.read_text() == "another's"


def test_a_file_system_without_links_is_told(marked: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    mark, path = marked

    def refuse(*_: str) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("handoff_agent.disks.images.os.link", refuse)
    with pytest.raises(PreconditionError, match="has no hard links"):
        make(mark, path)


def test_a_qemu_img_that_outlives_its_agent_makes_nothing_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, fill = tmp_path / "a.qcow2", images._fill

    def removed_before(command: Sequence[str], image: int, size: str, name: str) -> None:
        path.unlink()
        fill(command, image, size, name)

    monkeypatch.setattr(images, "_fill", removed_before)
    images.create(str(path), "qcow2", MIB)
    assert not list(tmp_path.iterdir())
