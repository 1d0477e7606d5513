"""Where the lab keeps things: one directory, and the record of what was asked for.

Layout below the directory (`HANDOFF_LAB_DIR`, by default /var/lib/handoff-lab):

    lab.json        what `up` was asked for
    NODE/           h1, ctl1, etcd1, fabric…: etc, run, log, lib of that node
    shared/         /srv/shared of every host
    cache/          /var/cache/libvirt of every host: QEMU is probed once for all
    guests/*.json   one record a guest
"""

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from handoff_lab.errors import LabError
from handoff_lab.pattern import Pattern, parse_mib

DEFAULT_DIRECTORY = Path("/var/lib/handoff-lab")
DEFAULT_PREFIX = Path("/opt/handoff")
MAX_HOSTS = 5
MAX_CONTROLLERS = 5

# A unix socket's path has at most 107 bytes, and NODE/run/handoff/slots/a/libvirt-sock comes behind the directory.
LONGEST_DIRECTORY = 60
# An emulated host puts directories of its own over these.
HIDDEN_FROM_HOSTS = ("/run", "/srv", "/proc", "/sys", "/etc", "/var/lib/libvirt", "/var/log", "/var/cache")


@dataclass(frozen=True, slots=True)
class LabConfig:
    """What `up` was asked for. `rates`: the link rate of a host, in tc's notation, where one was set; `types`: the type
    of a host, where it is not "standard"."""

    hosts: int = 3
    controllers: int = 2
    etcd: int = 1
    host_memory_mib: int = 2048
    agents: bool = True
    rates: dict[str, str] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Release:
    """An installed QEMU build. `name`: what the agents call it, such as "10.0" or "10.0-rebuilt"."""

    name: str
    emulator: Path

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor, such as (10, 0)."""
        major, minor = self.name.partition("-")[0].split(".")
        return int(major), int(minor)

    @property
    def machine(self) -> str:
        """Its newest q35 machine type."""
        return "pc-q35-{}.{}".format(*self.version)

    @property
    def shares_memory(self) -> bool:
        """It knows `aux-ram-share`, which makes a guest one that can change its QEMU without a copy."""
        return self.version >= (10, 0)


@dataclass(frozen=True, slots=True)
class DiskRecord:
    """A guest's disk as it was made. `place`: shared, local or volume; `path` is the same on every host, a volume's its
    name; `size` as qemu-img takes it. What it holds: pattern.py, with these MiB of data and of written zeros.
    `backing`: format of the image behind it, which then has the data; empty when there is none."""

    target: str
    path: str
    format: str
    size: str
    place: str
    data_mib: int = 0
    zeros_mib: int = 0
    seed: int = 0
    backing: str = ""

    @property
    def pattern(self) -> Pattern:
        """What it held when it was made."""
        return Pattern(parse_mib(self.size), self.data_mib, self.zeros_mib, self.seed)


@dataclass(frozen=True, slots=True)
class GuestRecord:
    """A lab guest as it was created; where it runs now, only libvirt knows."""

    name: str
    uuid: str
    number: int
    mac: str
    ip: str
    memory_mib: int
    vcpus: int
    home: str
    network: str
    disks: tuple[DiskRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class Lab:
    """The paths of one lab."""

    directory: Path
    prefix: Path

    @classmethod
    def from_environment(cls) -> "Lab":
        """The lab that HANDOFF_LAB_DIR and HANDOFF_PREFIX name. Raises LabError for a directory that can't work."""
        directory = Path(os.environ.get("HANDOFF_LAB_DIR") or DEFAULT_DIRECTORY).absolute()
        if len(str(directory)) > LONGEST_DIRECTORY:
            raise LabError(
                f"{directory} is too long for the sockets below it: set HANDOFF_LAB_DIR to a path of at most "
                f"{LONGEST_DIRECTORY} characters"
            )
        if any(directory.is_relative_to(hidden) for hidden in HIDDEN_FROM_HOSTS):
            raise LabError(f"{directory} is not visible inside emulated hosts: set HANDOFF_LAB_DIR to a path elsewhere")
        return cls(directory, Path(os.environ.get("HANDOFF_PREFIX") or DEFAULT_PREFIX))

    def node(self, name: str) -> Path:
        """The directory of a node."""
        return self.directory / name

    @property
    def shared(self) -> Path:
        """What hosts see as /srv/shared."""
        return self.directory / "shared"

    @property
    def releases_file(self) -> Path:
        """Which QEMU builds setup installed, the preferred one first: a name and a path a line."""
        return self.prefix / "releases"

    def releases(self) -> tuple[Release, ...]:
        """The QEMU builds, the preferred one first. Raises LabError when setup has not run."""
        try:
            lines = self.releases_file.read_text().splitlines()
        except FileNotFoundError:
            raise LabError(f"the machine is not set up ({self.releases_file}): run `make setup`") from None
        return tuple(Release(name, Path(path)) for name, path in (line.split(maxsplit=1) for line in lines))

    def release(self, name: str = "") -> Release:
        """A QEMU build by name; the preferred one by default. Raises LabError for one that setup did not install."""
        releases = self.releases()
        found = [release for release in releases if name in ("", release.name)]
        if not found:
            raise LabError(f"there is no QEMU {name}: there are {', '.join(release.name for release in releases)}")
        return found[0]

    @property
    def emulator(self) -> Path:
        """The QEMU that runs the lab's guests."""
        return self.release().emulator

    @property
    def guest_kernel(self) -> Path:
        """The guests' kernel."""
        return self.prefix / "guest/vmlinuz"

    @property
    def guest_initrd(self) -> Path:
        """The guests' initramfs."""
        return self.prefix / "guest/initrd"

    @property
    def probe_program(self) -> Path:
        """The UDP probe, see probe.py."""
        return self.prefix / "bin/handoff-probe"

    @property
    def switch_room(self) -> Path:
        """What gives Open vSwitch's packet sockets room, see lab/ovs/room.c."""
        return self.prefix / "lib/handoff-switch-room.so"

    def agent_socket(self, host: str) -> Path:
        """The gRPC socket of a host's agent, at this path inside and outside of the host."""
        return self.node(host) / "run/agent.sock"

    def controller_socket(self, controller: str) -> Path:
        """The gRPC socket of a controller, at this path inside and outside of its node."""
        return self.node(controller) / "run/controller.sock"

    def libvirt_socket(self, host: str, slot: str) -> Path:
        """The socket of one of a host's libvirt daemons, seen from outside of the host."""
        return self.node(host) / "run/handoff/slots" / slot / "libvirt-sock"

    def config(self) -> LabConfig | None:
        """What `up` was asked for; None when there is no lab."""
        try:
            return LabConfig(**json.loads((self.directory / "lab.json").read_text()))
        except FileNotFoundError:
            return None

    def require_config(self) -> LabConfig:
        """Like config, but raises LabError when there is no lab."""
        config = self.config()
        if config is None:
            raise LabError(f"there is no lab in {self.directory}: start one with `handoff-lab up`")
        return config

    def save_config(self, config: LabConfig) -> None:
        """Records what the lab is to be."""
        write_atomically(self.directory / "lab.json", json.dumps(dataclasses.asdict(config), indent=2))

    def guests(self) -> list[GuestRecord]:
        """The guests that were created, by name."""
        return [self.guest(path.stem) for path in sorted((self.directory / "guests").glob("*.json"))]

    def guest(self, name: str) -> GuestRecord:
        """One guest's record. Raises LabError when there is none."""
        try:
            fields = json.loads((self.directory / "guests" / f"{name}.json").read_text())
        except FileNotFoundError:
            raise LabError(f"there is no guest {name}: `handoff-lab guest list` shows them") from None
        return GuestRecord(**{**fields, "disks": tuple(DiskRecord(**disk) for disk in fields["disks"])})

    def save_guest(self, guest: GuestRecord) -> None:
        """Records a guest."""
        write_atomically(
            self.directory / "guests" / f"{guest.name}.json", json.dumps(dataclasses.asdict(guest), indent=2)
        )

    def forget_guest(self, name: str) -> None:
        """Removes a guest's record."""
        (self.directory / "guests" / f"{name}.json").unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the directory and holds its lock: one change of the lab at a time."""
        while True:
            self.directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                try:
                    current = self.directory.stat().st_ino
                except FileNotFoundError:
                    continue  # `down` removed it while we waited
                if os.fstat(descriptor).st_ino == current:
                    yield
                    return
            finally:
                os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that readers see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    scratch.replace(path)
