"""The lab's guests: real ones, run by QEMU without hardware help, through libvirt in slot a of a host."""

import dataclasses
import os
import re
import signal
import subprocess
import time
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from xml.sax.saxutils import quoteattr

from handoff_lab.errors import LabError
from handoff_lab.fleet import Fleet
from handoff_lab.host import LOCAL_FOLDERS, SLOTS, Host
from handoff_lab.images import make_image
from handoff_lab.netns import NetNamespace
from handoff_lab.networks import NO_NETWORK, TENANT, network_named
from handoff_lab.parallel import in_parallel
from handoff_lab.pattern import PATTERN_BEGIN, Pattern, parse_mib
from handoff_lab.state import DiskRecord, GuestRecord, Lab, Release
from handoff_lab.storage import Storage

FIRST_NUMBER, LAST_NUMBER = 10, 199
CONTROL_PORT = 5000
BOOT_DEADLINE_S = 120.0
VIRSH_DEADLINE_S = 30.0
LIST_DEADLINE_S = 10.0
DEFAULT_DISK = "size=1G,format=raw,place=shared"
DISK_SYNTAX = "size=1G,format=raw|qcow2,place=shared|local,data=SIZE,zeros=SIZE,backing=raw|qcow2,volume=NAME"
FORMATS = ("raw", "qcow2")
_OPTIONAL = ("data", "zeros", "volume", "backing")
DEFAULT_NETWORK = TENANT.name
# What an emulated processor is slow at, and a guest that lives for minutes needs not: a third of the time to boot.
QUICK_BOOT = "mitigations=off nokaslr cryptomgr.notests"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")
_PLACES = {"shared": "/srv/shared", "local": "/srv/vms"}


@dataclass(frozen=True, slots=True)
class Sighting:
    """A guest as one libvirt daemon sees it. `state` is virsh's word: running, paused, "shut off"…"""

    guest: str
    host: str
    slot: str
    state: str


def parse_disk(guest: str, index: int, text: str) -> DiskRecord:
    """Reads what DISK_SYNTAX says, each part optional. Raises LabError for anything else."""
    fields = dict(part.partition("=")[::2] for part in DEFAULT_DISK.split(",")) | dict.fromkeys(_OPTIONAL, "")
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in fields or not value:
            raise LabError(f"--disk {text}: write it like {DISK_SYNTAX}, or `none`")
        fields[key] = value
    image_format, place, volume, backing = (fields[key] for key in ("format", "place", "volume", "backing"))
    if image_format not in FORMATS or place not in _PLACES or backing not in ("", *FORMATS):
        raise LabError(f"--disk {text}: format and backing are raw or qcow2, place is shared or local")
    if backing and (image_format != "qcow2" or volume):
        raise LabError(f"--disk {text}: only a qcow2 image has a backing file")
    if volume and (image_format != "raw" or not _NAME.fullmatch(volume)):
        raise LabError(f"--disk {text}: a volume is raw; its name has small letters, digits and dashes")
    target = f"vd{chr(ord('a') + index)}"
    disk = DiskRecord(
        target=target,
        path=volume or f"{_PLACES[place]}/{guest}-{target}.{image_format}",
        format=image_format,
        size=fields["size"],
        place="volume" if volume else place,
        data_mib=parse_mib(fields["data"] or "0"),
        zeros_mib=parse_mib(fields["zeros"] or "0"),
        seed=zlib.crc32(f"{guest} {target}".encode()),
        backing=backing,
    )
    if parse_mib(disk.size) == 0 or not disk.pattern.fits:
        raise LabError(f"--disk {text}: {PATTERN_BEGIN >> 20}M, the data and the zeros must fit its size")
    return disk


def console_log(guest: str) -> str:
    """Where a guest's console is kept, seen from any host: both sides of a move append to it."""
    return f"/srv/shared/{guest}.console"


def domain_xml(guest: GuestRecord, lab: Lab, release: Release, machine: str = "", shareable: bool = True) -> str:
    """The guest's libvirt domain. `machine`: by default the newest that the release has.

    With `shareable`, its memory can be handed to another QEMU without a copy, if the release knows how.
    """
    disks = "".join(_disk_xml(disk, lab) for disk in guest.disks)
    network = network_named(guest.network)
    interface = (
        f"""
    <interface type='bridge'>
      <mac address='{guest.mac}'/>
      <source bridge='br-int'/>
      <virtualport type='openvswitch'/>
      <model type='virtio'/>
      <driver name='qemu'>
        <host csum='off' gso='off' tso4='off' tso6='off' ecn='off' ufo='off' mrg_rxbuf='off'/>
        <guest csum='off' tso4='off' tso6='off' ecn='off' ufo='off'/>
      </driver>
    </interface>"""
        if network is not None
        else ""
    )
    shared = (
        """
  <qemu:commandline>
    <qemu:arg value='-machine'/><qemu:arg value='aux-ram-share=on'/>
  </qemu:commandline>"""
        if shareable and release.shares_memory
        else ""
    )
    backing = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>" if shareable else ""
    address = f"ip4={guest.ip}/24 " if network is not None else ""
    metadata = network.metadata(guest.mac, guest.ip) if network is not None else ""
    return f"""<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{guest.name}</name>
  <uuid>{guest.uuid}</uuid>{metadata}
  <memory unit='MiB'>{guest.memory_mib}</memory>
  <vcpu>{guest.vcpus}</vcpu>
  {backing}
  <os>
    <type arch='x86_64' machine='{machine or release.machine}'>hvm</type>
    <kernel>{lab.guest_kernel}</kernel>
    <initrd>{lab.guest_initrd}</initrd>
    <cmdline>console=ttyS0 quiet loglevel=3 panic=0 {QUICK_BOOT} {address}hostname={guest.name}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <cpu mode='custom' match='exact'><model>qemu64</model></cpu>
  <on_crash>preserve</on_crash>
  <devices>
    <emulator>{release.emulator}</emulator>{disks}{interface}
    <serial type='pty'><log file='{console_log(guest.name)}' append='on'/></serial>
    <console type='pty'><target type='serial'/></console>
    <memballoon model='none'/>
  </devices>{shared}
</domain>
"""


def _disk_xml(disk: DiskRecord, lab: Lab) -> str:
    if disk.place == "volume":
        storage = Storage(lab)
        kind, source = (
            "network",
            f"""<source protocol='nbd' name='{disk.path}'>
        <host name='{storage.address}' port='{storage.volume(disk.path).port}'/>
      </source>""",
        )
    else:
        kind, source = "file", f"<source file={quoteattr(disk.path)}/>"
    return f"""
    <disk type='{kind}' device='disk'>
      <driver name='qemu' type='{disk.format}' cache='none' discard='unmap'/>
      {source}
      <target dev='{disk.target}' bus='virtio'/>
    </disk>"""


@dataclass(frozen=True, slots=True)
class Guests:
    """Creates, finds and removes guests. `hosts`: only these are looked at; empty: all."""

    fleet: Fleet
    hosts: tuple[str, ...] = ()

    @property
    def lab(self) -> Lab:
        """The lab that they are in."""
        return self.fleet.lab

    def create(
        self,
        name: str,
        host: str,
        memory_mib: int = 256,
        vcpus: int = 1,
        disks: tuple[str, ...] = (DEFAULT_DISK,),
        network: str = DEFAULT_NETWORK,
        wait: bool = True,
        release: str = "",
        machine: str = "",
        shareable: bool = True,
    ) -> GuestRecord:
        """Creates a guest and starts it; with `wait`, returns when its control port answers.

        `disks`: as parse_disk reads them; none at all for an empty tuple. `network`: see networks.py, or none.
        `release`: the QEMU build, by default the preferred one; `machine`: by default the build's newest.
        `shareable`: its memory can be handed over without a copy.
        A guest of that name that exists stays as it is; one that is off is started where it is defined.
        Raises LabError when anything fails; nothing is left then.
        """
        where = self.fleet.host(host)
        where.node.require_pid()
        build = self.lab.release(release)
        guest = self._admit(name, host, memory_mib, vcpus, disks, network)
        if seen := self.find(name):
            if all(sighting.state == "shut off" for sighting in seen):
                virsh(self.fleet.host(seen[0].host), seen[0].slot, "start", name)
        else:
            self._define(guest, where, lambda: domain_xml(guest, self.lab, build, machine, shareable))
        if wait:
            self.wait_ready(guest)
        return guest

    def _define(self, guest: GuestRecord, where: Host, xml: Callable[[], str]) -> None:
        name = guest.name
        try:
            for disk in guest.disks:
                self._make(disk, where)
            definition = f"/run/{name}.xml"
            (where.directory / f"run/{name}.xml").write_text(xml())
            virsh(where, "a", "define", definition)
            virsh(where, "a", "start", name)
        except LabError:
            self.delete(name)
            raise

    def _make(self, disk: DiskRecord, where: Host) -> None:
        if disk.place == "volume":
            with self.lab.locked():
                self.fleet.storage.start(self.fleet.fabric)
                self.fleet.storage.create(disk.path, disk.pattern)
            self.fleet.storage.grant(disk.path, where.name)
            return
        path = (self.lab.shared if disk.place == "shared" else where.directory / "vms") / Path(disk.path).name
        if not disk.backing:
            make_image(path, disk.format, disk.pattern)
            return
        behind = path.with_suffix(f".base.{disk.backing}")
        make_image(behind, disk.backing, disk.pattern)
        make_image(path, disk.format, Pattern(disk.pattern.size_mib, 0, 0, 0), behind)

    def _admit(
        self, name: str, host: str, memory_mib: int, vcpus: int, disks: tuple[str, ...], network: str
    ) -> GuestRecord:
        if not _NAME.fullmatch(name):
            raise LabError(f"{name!r} is no guest name: use small letters, digits and dashes")
        where = network_named(network)
        if where is not None and where.managed and not self.lab.require_config().agents:
            raise LabError(f"network {network} is kept by the agents, and this lab has none: `handoff-lab up --agents`")
        addressed = where or TENANT
        with self.lab.locked():
            existing = {guest.name: guest for guest in self.lab.guests()}
            if name in existing:
                return existing[name]
            taken = {guest.number for guest in existing.values() if _addressed_in(guest.network, addressed.name)}
            number = next((n for n in range(FIRST_NUMBER, LAST_NUMBER + 1) if n not in taken), None)
            if number is None:
                raise LabError(f"every address of network {addressed.name} is taken: delete a guest first")
            guest = GuestRecord(
                name=name,
                uuid=str(uuid.uuid4()),
                number=number,
                mac=addressed.guest_mac(number),
                ip=addressed.address(number),
                memory_mib=memory_mib,
                vcpus=vcpus,
                home=host,
                network=network,
                disks=tuple(parse_disk(name, index, text) for index, text in enumerate(disks)),
            )
            self.lab.save_guest(guest)
            return guest

    def wait_ready(self, guest: GuestRecord, deadline_s: float = BOOT_DEADLINE_S) -> None:
        """Waits until the guest's program answers; without a network, until its console says so. Raises LabError."""
        self._wait(guest, self._has_booted if guest.network == NO_NETWORK else self._answers, deadline_s)

    def wait_booted(self, guest: GuestRecord, deadline_s: float = BOOT_DEADLINE_S) -> None:
        """Waits until the guest's console says that it is ready, without a frame to it. Raises LabError."""
        self._wait(guest, self._has_booted, deadline_s)

    def _wait(self, guest: GuestRecord, is_ready: Callable[[GuestRecord], bool], deadline_s: float) -> None:
        until = time.monotonic() + deadline_s
        while time.monotonic() < until:
            if is_ready(guest):
                return
            time.sleep(0.05)
        log = self._console(guest)
        text = log.read_text(errors="replace")[-400:] if log.exists() else "no console"
        raise LabError(f"{guest.name} did not answer within {deadline_s:g} s; its console: {text}")

    def _console(self, guest: GuestRecord) -> Path:
        return self.lab.shared / Path(console_log(guest.name)).name

    def _has_booted(self, guest: GuestRecord) -> bool:
        log = self._console(guest)
        return log.exists() and b"HANDOFF-GUEST READY" in log.read_bytes()

    def _answers(self, guest: GuestRecord) -> bool:
        host = self.fleet.host(guest.home)
        network = network_named(guest.network)
        interface = network.interface if network is not None else ""
        try:
            with NetNamespace.of(host.node) as space, space.socket(interface=interface) as client:
                client.settimeout(1)
                client.connect((guest.ip, CONTROL_PORT))
                client.sendall(b"uptime\n")
                return b"monotonic_ns" in client.recv(200)
        except OSError:
            return False

    def sightings(self) -> list[Sighting]:
        """Every lab guest in every slot of every host that is up."""
        known = {guest.name for guest in self.lab.guests()}
        return [seen for seen in self.domains() if seen.guest in known]

    def domains(self) -> list[Sighting]:
        """Every domain, whoever made it, in every slot of every host that is up."""
        members = self.fleet.members(self.lab.require_config())
        hosts = [host for host in members if isinstance(host, Host) and host.name in (self.hosts or (host.name,))]
        asked = [(host, slot) for host in hosts for slot in SLOTS if host.daemons()[f"libvirtd-{slot}"].ready()]
        answers = in_parallel([partial(_domains, host, slot) for host, slot in asked])
        return [seen for answer in answers for seen in answer]

    def find(self, name: str) -> list[Sighting]:
        """Where a guest is defined or runs."""
        return [seen for seen in self.sightings() if seen.guest == name]

    def running_on(self, name: str) -> Host:
        """The host on which the guest runs (or is paused). Raises LabError when it runs nowhere, or twice."""
        self.lab.guest(name)
        active = [seen for seen in self.find(name) if seen.state not in ("shut off", "crashed")]
        if len(active) != 1:
            where = ", ".join(f"{seen.host}/{seen.slot} {seen.state}" for seen in active) or "nowhere"
            raise LabError(f"{name} is active in {where}")
        return self.fleet.host(active[0].host)

    def delete(self, name: str) -> None:
        """Ends a guest wherever it is, and removes its disks and its record. Nothing happens when there is none."""
        for seen in self.find(name):
            host = self.fleet.host(seen.host)
            if seen.state != "shut off":
                virsh(host, seen.slot, "destroy", name, check=False)
            virsh(host, seen.slot, "undefine", name, check=False)
        for disk in next((guest.disks for guest in self.lab.guests() if guest.name == name), ()):
            if disk.place == "volume":
                self.fleet.storage.delete(disk.path)
        hosts = [host for host in self.fleet.members(self.lab.require_config()) if isinstance(host, Host)]
        for directory in (self.lab.shared, *(host.directory / folder for host in hosts for folder in LOCAL_FOLDERS)):
            for pattern in (f"{name}-vd?.*", f"{name}.console"):
                for path in directory.glob(pattern):
                    path.unlink()
        self.lab.forget_guest(name)

    def qemu_pid(self, name: str) -> int:
        """The pid here of the guest's QEMU. Raises LabError when it does not run."""
        for seen in self.find(name):
            if seen.state in ("shut off", "crashed"):
                continue
            host = self.fleet.host(seen.host)
            pid_file = host.directory / f"run/handoff/slots/{seen.slot}/qemu/{name}.pid"
            pid = host.node.find(int(pid_file.read_text()))
            if pid is not None:
                return pid
        raise LabError(f"{name} does not run")

    def signal(self, name: str, number: signal.Signals) -> None:
        """Sends a signal to the guest's QEMU. Raises LabError when it does not run."""
        os.kill(self.qemu_pid(name), number)


def virsh(host: Host, slot: str, *arguments: str, check: bool = True, deadline_s: float = VIRSH_DEADLINE_S) -> str:
    """Runs virsh inside of a host, against one of its slots, and returns what it says. Raises LabError."""
    uri = f"qemu+unix:///system?socket=/run/handoff/slots/{slot}/libvirt-sock"
    done = host.node.run(["virsh", "-q", "-c", uri, *arguments], deadline_s=deadline_s, check=check)
    return done.stdout


def _addressed_in(network: str, name: str) -> bool:
    """Guests without a network have addresses of the default one, which they don't use."""
    return name == (DEFAULT_NETWORK if network == NO_NETWORK else network)


def _domains(host: Host, slot: str) -> list[Sighting]:
    """All domains of a slot; none when its libvirt does not answer."""
    try:
        lines = virsh(host, slot, "list", "--all", deadline_s=LIST_DEADLINE_S).splitlines()
    except (LabError, subprocess.SubprocessError):
        return []
    rows = [line.split(None, 2) for line in lines if line.strip()]
    return [Sighting(row[1], host.name, slot, row[2].strip()) for row in rows if len(row) == 3]


def as_json(guest: GuestRecord, seen: list[Sighting]) -> dict[str, object]:
    """A guest for `-o json`."""
    active = [s for s in seen if s.state not in ("shut off", "crashed")]
    return {
        **dataclasses.asdict(guest),
        "host": active[0].host if active else None,
        "slot": active[0].slot if active else None,
        "state": active[0].state if active else (seen[0].state if seen else "lost"),
        "seen": [{"host": s.host, "slot": s.slot, "state": s.state} for s in seen],
    }
