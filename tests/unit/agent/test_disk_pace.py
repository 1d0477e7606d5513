"""When a guest's writes must wait: samples in, decision out."""

from handoff_agent.disks.pace import Sample, decide, rate_bytes_per_s

MIB = 1 << 20


def mirror(*, guest_mib_per_s: float, link_mib_per_s: float, disk_mib: float, seconds: float) -> list[Sample]:
    """A mirror of a disk whose guest writes all the time, read four times a second."""
    samples, done, total = [], 0.0, disk_mib
    for quarter in range(int(seconds * 4)):
        samples.append(Sample(quarter / 4, int(done * MIB), int(total * MIB), ready=done >= total))
        done = min(total, done + link_mib_per_s / 4)
        total += guest_mib_per_s / 4
    return samples


def test_an_idle_guest_is_never_slowed() -> None:
    samples = mirror(guest_mib_per_s=0, link_mib_per_s=50, disk_mib=400, seconds=12)
    assert not any(decide(samples[: n + 1]).write_blocking for n in range(len(samples)))
    assert decide(samples).reason == "in step with the guest"


def test_a_guest_is_left_alone_during_the_first_pass() -> None:
    samples = mirror(guest_mib_per_s=100, link_mib_per_s=50, disk_mib=400, seconds=7)
    assert not decide(samples).write_blocking
    assert "first pass" in decide(samples).reason


def test_a_guest_that_writes_faster_is_slowed_soon_after_the_first_pass() -> None:
    samples = mirror(guest_mib_per_s=100, link_mib_per_s=50, disk_mib=400, seconds=11)
    decision = decide(samples)
    assert decision.write_blocking
    assert "writes as fast as is sent" in decision.reason


def test_a_guest_that_is_being_caught_up_with_is_not() -> None:
    samples = mirror(guest_mib_per_s=10, link_mib_per_s=50, disk_mib=400, seconds=10.25)
    assert not any(decide(samples[: n + 1]).write_blocking for n in range(len(samples)))


def test_no_total_yet() -> None:
    samples = [Sample(0.0, 0, 0), Sample(0.1, 1 * MIB, 100 * MIB)]
    assert "first pass" in decide(samples).reason


def test_the_rate_is_that_of_the_last_seconds() -> None:
    samples = [Sample(0, 0, 100), Sample(8, 80 * MIB, 100 * MIB), Sample(10, 90 * MIB, 100 * MIB)]
    assert rate_bytes_per_s(samples) == 5 * MIB
    assert rate_bytes_per_s(samples[:1]) == 0
