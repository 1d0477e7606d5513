"""What would give a second copy away, gives it away."""

import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from handoff_lab.journal import RECORD_BYTES, REGION_BEGIN
from soak.pulse import Pulse
from soak.writers import SPAN_MIB, Sightings, Writers

MAGIC = int.from_bytes(b"HOJRNL01", "little")


class Echo:
    """A guest's echo, with a clock that can be set back as a pause does, and ahead as only another copy could."""

    def __init__(self) -> None:
        self.behind_ns = 0
        self.silent = False
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.settimeout(0.05)
        self._ending = False
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def _answer(self) -> None:
        while not self._ending:
            try:
                data, peer = self._socket.recvfrom(64)
            except TimeoutError:
                continue
            if not self.silent:
                number, sent, _, rest = struct.unpack("<QQQQ", data)
                clock = time.monotonic_ns() - self.behind_ns
                self._socket.sendto(struct.pack("<QQQQ", number, sent, clock, rest), peer)

    def close(self) -> None:
        self._ending = True
        self._thread.join()
        self._socket.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    found = Echo()
    yield found
    found.close()


@pytest.fixture
def pulse(echo: Echo) -> Iterator[Pulse]:
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with Pulse(client, "127.0.0.1", echo.port) as found:
        until = time.monotonic() + 5
        while found.answers < 5 and time.monotonic() < until:
            time.sleep(0.01)
        yield found


def heard_more(pulse: Pulse, count: int = 5) -> None:
    goal, until = pulse.answers + count, time.monotonic() + 5
    while pulse.answers < goal and time.monotonic() < until:
        time.sleep(0.01)
    assert pulse.answers >= goal


def test_a_guest_that_answers_has_no_outage(pulse: Pulse) -> None:
    assert pulse.outage_ms(time.monotonic_ns()) == 0
    assert pulse.contradiction == ""


def test_a_pause_is_an_outage_and_no_contradiction(echo: Echo, pulse: Pulse) -> None:
    began = time.monotonic_ns()
    echo.silent = True
    time.sleep(0.5)
    assert pulse.outage_ms(began) is None
    echo.behind_ns += 500_000_000
    echo.silent = False
    heard_more(pulse)
    outage_ms = pulse.outage_ms(began)
    assert outage_ms is not None
    assert 400 < outage_ms < 3000
    assert pulse.contradiction == ""


def test_a_copy_that_was_not_paused_is_noticed(echo: Echo, pulse: Pulse) -> None:
    echo.behind_ns = 500_000_000
    heard_more(pulse)
    echo.behind_ns = 0
    heard_more(pulse)
    assert "another copy" in pulse.contradiction


def test_a_number_that_is_written_twice_is_noticed() -> None:
    seen = Sightings()
    seen.note(1, 100)
    seen.note(1, 100)
    assert seen.contradiction == ""
    seen.note(1, 5_000_100)
    assert "record 1 was written twice, 5 ms apart" in seen.contradiction


def test_a_record_of_the_past_is_noticed() -> None:
    seen = Sightings()
    for seq, clock_ns in ((1, 100), (2, 200), (3, 150)):
        seen.note(seq, clock_ns)
    seen.in_order()
    assert "record 3 is older than record 2" in seen.contradiction


def write_record(image: Path, seq: int, clock_ns: int, epoch: int = 7) -> None:
    slots = (SPAN_MIB << 20) // RECORD_BYTES
    offset = REGION_BEGIN + (seq - 1) % slots * RECORD_BYTES
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack("<6Q", MAGIC, seq, clock_ns, offset, epoch, slots))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(4 << 20)
    return path


def test_one_writer_is_in_order(image: Path) -> None:
    writers = Writers([image])
    for seq in range(1, 600):
        write_record(image, seq, 1000 * seq)
    assert writers.problems(epoch=7, acked_seq=599) == []


def test_two_writers_are_noticed_while_they_write(image: Path) -> None:
    writers = Writers([image])
    write_record(image, 1, 1000)
    write_record(image, 2, 2000)
    assert writers.contradictions() == []
    write_record(image, 2, 2500)
    assert "written twice" in writers.contradictions()[0]


def test_a_copy_has_the_same_records_and_another_writer_has_not(image: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    writers = Writers([image, copy])
    for seq in range(1, 10):
        write_record(image, seq, 1000 * seq)
    assert writers.contradictions() == []
    shutil.copy(image, copy)
    write_record(image, 10, 10_000)
    assert writers.problems(epoch=7, acked_seq=10) == []
    write_record(copy, 10, 10_500)
    assert "record 10 was written twice" in writers.contradictions()[0]


def test_a_record_that_the_guest_never_wrote_is_noticed(image: Path) -> None:
    writers = Writers([image])
    for seq in range(1, 10):
        write_record(image, seq, 1000 * seq)
    assert writers.problems(epoch=7, acked_seq=6) == ["the disk has record 9, and the guest has written only 6"]
