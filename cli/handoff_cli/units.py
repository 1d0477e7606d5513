"""Sizes, rates and durations, as people write and read them. Pure."""

import re
from datetime import UTC, datetime

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_PREFIXES = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}
_SECONDS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*((?i:[kmgt]i?))?((?i:bit)|B)(?:/s)?")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


def parse_rate(text: str) -> int:
    """Bytes per second of "1gbit", "800mbit/s", "100MiB/s" or "100MB". Raises ValueError, which says what is expected.

    A bare number, "Mb" and "Mbps" are refused: one reader takes them for bits and the next for bytes.
    """
    match = _RATE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a rate: give bits as 1gbit or 800mbit, bytes as 100MiB/s or 125MB/s")
    number, prefix, unit = match.groups()
    scaled = float(number) * _PREFIXES[(prefix or "").lower()]
    bytes_per_s = round(scaled / 8 if unit != "B" else scaled)
    if not 0 < bytes_per_s < 1 << 63:
        raise ValueError(f"{text!r} is not a rate that a link can have; for no limit leave it out")
    return bytes_per_s


def parse_duration(text: str) -> float:
    """Seconds of "90", "1.5s", "500ms", "10m" or "2h". Raises ValueError, which says what is expected."""
    match = _DURATION.fullmatch(text.strip())
    scale = _SECONDS.get(match.group(2).lower()) if match else None
    if match is None or scale is None:
        raise ValueError(f"{text!r} is not a duration: give seconds, or a number with ms, s, m or h")
    seconds = float(match.group(1)) * scale
    if not 0 < seconds <= 10 * 365 * 86400:
        raise ValueError(f"{text!r}: must be longer than 0 and shorter than 10 years")
    return seconds


def format_bytes(count: int) -> str:
    """ "412 MiB": three digits at least, so that 1.5 GiB does not become 2."""
    value = float(count)
    for unit in _BINARY:
        if round(value) < 1024 or unit == _BINARY[-1]:
            break
        value /= 1024
    if unit == "B" or value >= 99.95:
        return f"{value:.0f} {unit}"
    return f"{value:.1f} {unit}" if value >= 9.995 else f"{value:.2f} {unit}"


def format_rate(bytes_per_s: int) -> str:
    """ "38.1 MiB/s"."""
    return f"{format_bytes(bytes_per_s)}/s"


def format_ms(milliseconds: float) -> str:
    """A short time, such as a guest's pause: "0.4 ms", "84 ms", "1.35 s"."""
    if milliseconds < 9.95:
        return f"{milliseconds:.1f} ms"
    if milliseconds < 999.5:
        return f"{milliseconds:.0f} ms"
    return format_duration(milliseconds / 1000)


def format_duration(seconds: float) -> str:
    """Any time: "84 ms", "4.20 s", "30 s", "3 min 12 s", "2 h 5 min", "3 d 4 h"."""
    if seconds <= 0:
        return "0 s"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        text = f"{seconds:.2f}" if seconds < 9.995 else f"{seconds:.1f}"
        return f"{text.removesuffix('.00').removesuffix('.0')} s"
    if seconds < 3599.5:
        return _in_two(round(seconds), 60, "min", "s")
    if seconds < 24 * 3600 - 30:
        return _in_two(round(seconds / 60), 60, "h", "min")
    return _in_two(round(seconds / 3600), 24, "d", "h")


def _in_two(count: int, size: int, larger: str, smaller: str) -> str:
    whole, rest = divmod(count, size)
    return f"{whole} {larger} {rest} {smaller}" if rest else f"{whole} {larger}"


def format_age(seconds: float) -> str:
    """How long ago, in one unit: "now", "12 s", "3 min", "5 h", "12 d"."""
    if seconds < 1:
        return "now"
    for limit, size, unit in ((60, 1, "s"), (3600, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds // 86400)} d"


def format_clock(when: datetime) -> str:
    """Local time of day with milliseconds."""
    return f"{when.astimezone():%H:%M:%S}.{when.microsecond // 1000:03}"


def format_date(when: datetime) -> str:
    """Local date and time, with the zone."""
    return f"{when.astimezone():%Y-%m-%d %H:%M:%S %Z}"


def now() -> datetime:
    """The time, with its zone."""
    return datetime.now(UTC)
