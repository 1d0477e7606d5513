"""What is known of an installed QEMU build, and which one a guest runs under. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

# Zero pages are found by the channels' threads, and the end of a pass is told them once.
MULTIFD_SINCE: Final = 9


@dataclass(frozen=True, slots=True)
class Build:
    """One installed QEMU."""

    path: str
    name: str
    """What the host's configuration calls it."""
    release: str
    """Such as "10.0.2"."""
    machine_types: frozenset[str]
    """Names that `-machine` takes, aliases too."""
    cpu_models: frozenset[str] = frozenset()
    """CPU models that it can run on this host; empty when libvirt could not tell."""
    cpr: bool = False
    """It has cpr-transfer and `aux-ram-share`: it can pass memory on, and take it, without a copy."""
    device_types: frozenset[str] = frozenset()
    """What `-device` takes, such as "virtio-net-pci"; empty when it could not tell."""


def choose_build(builds: Iterable[Build], *, release: str, path: str) -> Build | None:
    """The build to run a guest of `release` under: the one at `path` if it is of that release, else the first such."""
    of_release = [build for build in builds if build.release == release]
    return next((build for build in of_release if build.path == path), of_release[0] if of_release else None)


def has_multifd(release: str) -> bool:
    """Whether that release copies over several connections in a way that the others understand: from 9.0 on."""
    major, _, _ = release.partition(".")
    return major.isdecimal() and int(major) >= MULTIFD_SINCE


def name_of(builds: Iterable[Build], *, path: str, running: str) -> str:
    """What the host calls the build at `path`; empty when it is not configured, or is not what `running` came from.

    `running`: the release that a QEMU started from that path says it is; empty when none was asked.
    """
    found = next((build for build in builds if build.path == path), None)
    return found.name if found is not None and running in ("", found.release) else ""
