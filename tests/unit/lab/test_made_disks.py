"""What a made disk holds follows from a line of text."""

from pathlib import Path

import pytest

from handoff_lab.errors import LabError
from handoff_lab.guest import parse_disk
from handoff_lab.images import make_image
from handoff_lab.pattern import MIB, PATTERN_BEGIN, Content, Pattern


@pytest.mark.parametrize("pattern", [Pattern(4096, 500, 300, 1), Pattern(70, 3, 3, 1), Pattern(64, 0, 0, 1)])
def test_the_layout_is_whole_and_has_what_was_asked_for(pattern: Pattern) -> None:
    extents = list(pattern.extents())

    ends = [PATTERN_BEGIN, *(extent.end for extent in extents)]
    assert [extent.start for extent in extents] == ends[:-1]
    assert ends[-1] == max(PATTERN_BEGIN, pattern.size_mib * MIB)
    wanted = {Content.DATA: pattern.data_mib, Content.ZEROS: pattern.zeros_mib}
    for content, mib in wanted.items():
        assert sum(extent.length for extent in extents if extent.content is content) == mib * MIB


def test_no_two_pages_of_data_are_alike() -> None:
    blocks = Pattern(1024, 128, 0, 7).data()
    here, there = blocks.at(PATTERN_BEGIN), blocks.at(PATTERN_BEGIN + MIB)
    pages = {bytes(block[at : at + 4096]) for block in (here, there) for at in range(0, MIB, 4096)}

    assert len(pages) == 512
    assert Pattern(1024, 128, 0, 7).data().at(PATTERN_BEGIN) == here
    assert Pattern(1024, 128, 0, 8).data().at(PATTERN_BEGIN) != here


def test_disks_as_they_are_asked_for() -> None:
    plain = parse_disk("web", 0, "size=1G")
    assert (plain.path, plain.format, plain.place) == ("/srv/shared/web-vda.raw", "raw", "shared")
    assert plain.pattern == Pattern(1024, 0, 0, plain.seed)
    overlay = parse_disk("web", 1, "size=4G,format=qcow2,place=local,data=1G,zeros=300M,backing=raw")
    assert (overlay.path, overlay.backing) == ("/srv/vms/web-vdb.qcow2", "raw")
    assert (overlay.pattern.data_mib, overlay.pattern.zeros_mib) == (1024, 300)
    volume = parse_disk("web", 2, "volume=db-1")
    assert (volume.path, volume.place) == ("db-1", "volume")
    assert len({plain.seed, overlay.seed, volume.seed}) == 3


@pytest.mark.parametrize(
    "text",
    [
        "size=1",
        "size=0M",
        "size=1G,color=red",
        "format=vmdk",
        "place=moon",
        "size=100M,data=37M",
        "backing=raw",
        "volume=x,format=qcow2",
        "volume=../x",
        "format=qcow2,backing=raw,volume=x",
    ],
)
def test_disks_that_can_not_be(text: str) -> None:
    with pytest.raises(LabError, match=r"--disk|size"):
        parse_disk("web", 0, text)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_an_image_has_what_was_asked_for_and_no_more(tmp_path: Path, image_format: str) -> None:
    image = tmp_path / f"a.{image_format}"
    make_image(image, image_format, Pattern(512, 8, 8, 3))

    assert 16 * MIB <= 512 * image.stat().st_blocks <= 17 * MIB
    with pytest.raises(LabError, match="exists already"):
        make_image(image, image_format, Pattern(512, 8, 8, 3))
