import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handoff_cli.units import (
    format_age,
    format_bytes,
    format_duration,
    format_ms,
    parse_duration,
    parse_rate,
)


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("1gbit", 125_000_000),
        ("1Gbit/s", 125_000_000),
        ("800 mbit", 100_000_000),
        ("1gibit", 1 << 27),
        ("100MiB/s", 100 << 20),
        ("100MB/s", 100_000_000),
        ("2.5GiB", 5 << 29),
        ("5000000B", 5_000_000),
        ("8bit", 1),
    ],
)
def test_rates(text: str, bytes_per_s: int) -> None:
    assert parse_rate(text) == bytes_per_s


@pytest.mark.parametrize(
    "text", ["", "100", "100M", "100Mb", "1gbps", "-1gbit", "0bit", "1e9B", "fast", "1 g bit", "9999999999TiB"]
)
def test_what_is_no_rate_or_could_mean_two_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_rate(text)


@given(st.integers(1, 1 << 32), st.sampled_from(["B", "KiB", "MiB", "GiB"]))
def test_a_rate_in_bytes_comes_back(count: int, unit: str) -> None:
    factor = 1024 ** ["B", "KiB", "MiB", "GiB"].index(unit)
    assert parse_rate(f"{count}{unit}/s") == count * factor


@given(st.integers(1, 1 << 40))
def test_eight_bits_are_a_byte(count: int) -> None:
    assert parse_rate(f"{8 * count}kbit") == parse_rate(f"{count}kB")


@given(st.integers(0, 1 << 60))
def test_a_size_is_read_back_within_a_percent(count: int) -> None:
    number, unit = format_bytes(count).split(" ")
    size = float(number) * 1024 ** ["B", "KiB", "MiB", "GiB", "TiB", "PiB"].index(unit)
    assert size == pytest.approx(count, rel=0.006, abs=0.5)
    assert len(number) <= 4


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1 << 20, "1.00 MiB"), (412 << 20, "412 MiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.floats(0.001, 3e8))
def test_a_duration_is_read_back_within_a_few_percent(seconds: float) -> None:
    factors = {"ms": 0.001, "s": 1, "min": 60, "h": 3600, "d": 86400}
    words = format_duration(seconds).split(" ")
    read = sum(float(number) * factors[unit] for number, unit in zip(words[::2], words[1::2], strict=True))
    assert read == pytest.approx(seconds, rel=0.03, abs=0.0006)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.0842, "84 ms"),
        (2, "2 s"),
        (4.2, "4.20 s"),
        (59.96, "1 min"),
        (192, "3 min 12 s"),
        (1800, "30 min"),
        (3599.7, "1 h"),
        (7500, "2 h 5 min"),
        (86_399, "1 d"),
        (280_800, "3 d 6 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("ms", "text"), [(0.43, "0.4 ms"), (9.96, "10 ms"), (84.2, "84 ms"), (999.6, "1 s"), (1350, "1.35 s")]
)
def test_pauses(ms: float, text: str) -> None:
    assert format_ms(ms) == text


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1.5s", 1.5), ("500ms", 0.5), ("10m", 600), ("10 min", 600), ("2h", 7200)]
)
def test_times_as_typed(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1", "0", "1d", "1h30m", "99999999999"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(-2, "now"), (0.9, "now"), (12, "12 s"), (60, "1 min"), (36_000, "10 h"), (200_000, "2 d")]
)
def test_ages(seconds: float, text: str) -> None:
    assert format_age(seconds) == text
