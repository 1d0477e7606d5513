"""Processes of this machine, found by their command line."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path


def find_process(matches: Callable[[Sequence[bytes]], bool]) -> int:
    """The pid of the only process whose words match. Others may come and go meanwhile."""
    found = _matching(matches)
    assert len(found) == 1, f"{len(found)} processes match: {found}"
    return found[0]


def incoming_qemu(guest: str) -> int:
    """The QEMU that waits, or once waited, for the guest with this UUID to come."""

    def matches(words: Sequence[bytes]) -> bool:
        program = words[0].rpartition(b"/")[2]
        return program.startswith(b"qemu-system") and guest.encode() in words and b"-incoming" in words

    return find_process(matches)


def processes_with(part: str) -> list[int]:
    """The pids of those with these characters in one of their words."""
    return _matching(lambda words: any(part.encode() in word for word in words))


def _matching(matches: Callable[[Sequence[bytes]], bool]) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if matches((process / "cmdline").read_bytes().split(b"\0")):
                found.append(int(process.name))
    return found
