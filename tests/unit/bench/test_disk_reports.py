"""What `make bench-disks` and `make bench-fast` make of their readings."""

from dataclasses import asdict

from bench import disks, fast
from bench.wire import Sample, Wire


def moved(total_ms: float, wire: float, *, link_use: float = 0.97) -> dict[str, float]:
    return asdict(disks.Reading(total_ms, 220 << 20, 20 << 20, 200 << 20, wire, 1.004, link_use, 1.01, 0.99))


def test_targets_are_missed_by_the_worst_of_ours() -> None:
    cells = {
        "raw-raw-half": {"ours": moved(5000, 1.01), "virsh": moved(10000, 1.4)},
        "raw-qcow2-zeros": {"ours": moved(5000, 1.03, link_use=0.2), "virsh": moved(4000, 2.4)},
    }
    found = disks.targets(cells)
    assert (found["wire"].worst, found["wire"].met) == (1.03, False)
    assert found["allocated"].met
    assert (found["link_use"].worst, found["link_use"].met) == (0.2, False)
    assert (found["disk_link_use"].worst, found["disk_link_use"].met) == (0.99, True)
    assert (found["most_in_1s"].worst, found["most_in_1s"].met) == (1.01, True)
    assert disks.against_virsh(cells["raw-raw-half"])["total_ms"] == 0.5


def test_rates_are_of_the_middle() -> None:
    """Nothing for a second, 64 bytes a second for four, nothing for a second, 64 for five; the rest at once."""
    wire = Wire.__new__(Wire)
    counts = [0, 0, 64, 128, 192, 256, 256, 320, 384, 448, 512, 576, 600]
    wire._samples = [Sample(float(at_s), sent) for at_s, sent in enumerate(counts)]
    assert wire.middle_bytes_per_s() == 64 * 7 / 8
    assert wire.middle_bytes_per_s(256) == 64
    assert wire.most_bytes_per_s() == 64
    assert wire.most_bytes_per_s(over_s=5) == 64 * 4 / 5


def test_growth_is_of_the_time_until_the_guest_runs() -> None:
    cells = {f"{gib}": {"fast": asdict(fast.Reading(1000 + gib, 9000.0 * gib, 50))} for gib in (1, 8)}
    assert fast.growth(cells, "fast") == 1.007
    assert fast.growth(cells, "copy") is None
