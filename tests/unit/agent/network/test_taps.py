"""When a tap counts as empty, by what the kernel counts."""

from collections.abc import Sequence
from ipaddress import IPv4Address
from typing import cast

import pytest

from handoff_agent.network import plumbing, taps
from handoff_agent.network.bridge import Bridge
from handoff_agent.network.pipeline import NOBODYS_FRAME
from handoff_agent.network.taps import Taps
from handoff_agent.network.treatment import Key
from handoff_agent.ovs_ports import OvsPorts
from handoff_agent.settings import NetworkSettings

KEY = Key(1001, "52:54:00:30:00:0a")


class Wire:
    """A bridge with one tap, of which QEMU reads by what `counts` says."""

    def __init__(self, *counts: int) -> None:
        self.numbers = {"vnet0": 5}
        self.sent: list[bytes] = []
        self._counts = list(counts)

    def send(self, actions: Sequence[object], frame: bytes) -> None:
        self.sent.append(frame)

    def count(self, tap: str) -> int:
        assert tap == "vnet0"
        return self._counts.pop(0) if len(self._counts) > 1 else self._counts[0]

    @property
    def is_over(self) -> bool:
        return len(self._counts) == 1


def taps_of(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> Taps:
    monkeypatch.setattr(plumbing, "frames_read", wire.count)
    settings = NetworkSettings(tunnel_address=IPv4Address("10.21.0.1"))
    taps = Taps(settings, "unix:/none", cast(OvsPorts, None), cast(Bridge, wire))
    taps.bind({"1001/52:54:00:30:00:0a": "vnet0"})
    return taps


@pytest.mark.parametrize(
    ("counts", "tries"),
    [
        pytest.param((7, 7, 8, 8, 8), 1, id="nothing else was in it"),
        pytest.param((7, 7, 7, 9, 10, 10, 10, 10, 11, 11, 11), 2, id="QEMU reads three, and nothing after them"),
        pytest.param((7, 8, 8, 9, 9, 9, 9, 10, 10, 10), 2, id="one comes late, by what the switch had cached"),
        pytest.param((7, 57, 57, 57, 57, 91, 91, 91, 91, 92, 92, 92), 3, id="QEMU pauses after each fifty"),
    ],
)
async def test_it_is_empty_once_a_frame_of_ours_is_all_that_is_read(
    counts: tuple[int, ...], tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taps, "DRAIN_TIMEOUT_S", 10.0)
    wire = Wire(*counts)
    assert await taps_of(wire, monkeypatch).drain(KEY)
    assert wire.sent == [NOBODYS_FRAME] * tries
    assert wire.is_over


async def test_one_that_is_never_empty_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps, "DRAIN_TIMEOUT_S", 0.05)
    assert not await taps_of(Wire(*range(0, 100_000, 2)), monkeypatch).drain(KEY)


async def test_a_qemu_that_reads_nothing_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not await taps_of(Wire(7), monkeypatch).drain(KEY)


async def test_what_can_not_be_counted_does_not_hold_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    taps = taps_of(Wire(7), monkeypatch)

    def gone(_tap: str) -> int:
        raise FileNotFoundError

    monkeypatch.setattr(plumbing, "frames_read", gone)
    assert not await taps.drain(KEY)


async def test_a_port_without_a_tap_has_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await taps_of(Wire(7), monkeypatch).drain(Key(1001, "52:54:00:30:00:0b"))
