"""The fleet that the soak runs on, and who is who in it right now."""

import asyncio
import base64
import json
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from handoff_lab.errors import LabError
from handoff_lab.etcd import CLIENT_PORT, etcd_address
from handoff_lab.fleet import Fleet
from handoff_lab.guest import DEFAULT_NETWORK, Guests
from handoff_lab.host import Host
from handoff_lab.networks import RED, network_named
from handoff_lab.node import processes
from handoff_lab.state import DiskRecord, GuestRecord, LabConfig
from soak.clients import AgentSide, Controllers
from soak.faults import Victim

OBSERVER: Final = "h5"
CONFIG: Final = LabConfig(hosts=5, controllers=2, etcd=3)
DISK_MIB: Final = 48
_AGENT_FILES: Final = ("agent", "slot-a/var/lib/libvirt", "slot-a/var/log/libvirt")


@dataclass(frozen=True, slots=True)
class Lane:
    """Two hosts between which one guest moves. What breaks in one lane does not touch the other."""

    name: str
    hosts: tuple[str, str]
    network: str = DEFAULT_NETWORK
    """The guest's, see networks.py."""
    local_disks: tuple[str, ...] = ()
    """The guest's, beside its shared one."""
    journal: str = "vda"
    """The disk that it writes its journal to: the shared one, or a raw local one."""

    @property
    def guest(self) -> str:
        """The guest that is moved."""
        return f"guest-{self.name}"

    @property
    def blocker(self) -> str:
        """The guest that goes first where that has to wait."""
        return f"blocker-{self.name}"


LOCAL_DISKS: Final = ("size=96M,format=raw,place=local,data=16M", "size=96M,format=qcow2,place=local,data=8M")
"""A slow copy of their data takes more than a second."""
LANES: Final = (
    Lane("a", ("h1", "h2")),
    Lane("b", ("h3", "h4"), network=RED.name, local_disks=LOCAL_DISKS, journal="vdb"),
)
"""The guest of the first has nothing that would have to go with it; that of the second a tenant's port and disks."""


@dataclass(frozen=True, slots=True)
class Cast:
    """Who plays which part in one cell: the pids of everything that may be struck, but the destination's QEMU."""

    source: str
    destination: str
    leader: str
    etcd_leader: str
    etcd_follower: str
    pids: dict[Victim, int]
    etcd_pids: tuple[int, ...]


class Scene:
    """A fleet, and a lane of it with its guest.

    `holding` is shared by all lanes: to hold a migration, etcd is frozen, and only one at a time may do that.
    """

    def __init__(
        self, fleet: Fleet, lane: Lane, controllers: Controllers, guest: GuestRecord, holding: asyncio.Lock
    ) -> None:
        self.fleet = fleet
        self.lane = lane
        self.controllers = controllers
        self.guest = guest
        self.holding = holding

    @property
    def guests(self) -> Guests:
        """The guests of the lane."""
        return Guests(self.fleet, self.lane.hosts)

    def hosts(self) -> list[Host]:
        """The hosts of the lane."""
        return [self.fleet.host(name) for name in self.lane.hosts]

    @property
    def journal(self) -> DiskRecord:
        """The disk that the guest's journal is on. Its image is raw."""
        return next(disk for disk in self.guest.disks if disk.target == self.lane.journal)

    def image_on(self, host: str) -> Path:
        """The image of that disk when the guest is on a host, seen from here."""
        disk = self.journal
        folder = self.fleet.lab.shared if disk.place == "shared" else self.fleet.host(host).directory / "vms"
        return folder / Path(disk.path).name

    @property
    def local_disks(self) -> tuple[DiskRecord, ...]:
        """Those that go with the guest."""
        return tuple(disk for disk in self.guest.disks if disk.place == "local")

    @property
    def interface(self) -> str:
        """What the observer reaches the guest from."""
        network = network_named(self.guest.network)
        assert network is not None, f"{self.guest.name} has no network"
        return network.interface

    def agent(self, host: str) -> AgentSide:
        """The agent of a host."""
        return AgentSide(self.fleet.lab, host)

    async def cast(self) -> Cast:
        """Looks everybody up, while all is well. Raises LabError when something is not."""
        source = (await asyncio.to_thread(self.guests.running_on, self.guest.name)).name
        destination = next(host for host in self.lane.hosts if host != source)
        leader, etcd_leader = await asyncio.gather(self.leader(), self.etcd_leader())
        members = [f"etcd{n}" for n in range(1, CONFIG.etcd + 1)]
        etcd_follower = next(name for name in members if name != etcd_leader)
        daemons = {
            Victim.SOURCE_AGENT: (source, "agent"),
            Victim.DESTINATION_AGENT: (destination, "agent"),
            Victim.SOURCE_LIBVIRTD: (source, "libvirtd-a"),
            Victim.DESTINATION_LIBVIRTD: (destination, "libvirtd-a"),
            Victim.LEADER: (leader, "controller"),
            Victim.ETCD_LEADER: (etcd_leader, "etcd"),
            Victim.ETCD_FOLLOWER: (etcd_follower, "etcd"),
        }
        pids = {victim: self._daemon(*where) for victim, where in daemons.items()}
        pids[Victim.SOURCE_QEMU] = await self.qemu(source, 10.0)
        etcd_pids = tuple(self._daemon(name, "etcd") for name in members)
        self.controllers.ask_first = next(name for name in self.controllers.names if name != leader)
        return Cast(source, destination, leader, etcd_leader, etcd_follower, pids, etcd_pids)

    def _daemon(self, node: str, daemon: str) -> int:
        pid = self.fleet.daemon(node, daemon).pid()
        if pid is None:
            raise LabError(f"{daemon} of {node} does not run")
        return pid

    async def qemu(self, host: str, deadline_s: float) -> int:
        """Waits for the guest's QEMU on a host, and returns its pid. Raises LabError."""
        until = asyncio.get_running_loop().time() + deadline_s
        while not (found := qemus(self.fleet.host(host), self.guest.name)):
            if asyncio.get_running_loop().time() > until:
                raise LabError(f"there is no QEMU of {self.guest.name} on {host}")
            await asyncio.sleep(0.01)
        return found[0]

    async def leader(self) -> str:
        """The controller that leads, by etcd's word. Raises LabError when none does within 20 s."""
        async with asyncio.timeout(20):
            while True:
                answer = json.loads(await self._etcdctl("get", "--prefix", "/handoff/v1/leader/"))
                if candidates := answer.get("kvs", []):
                    first = min(candidates, key=lambda candidate: int(candidate["create_revision"]))
                    return str(json.loads(base64.b64decode(first["value"]))["name"])
                await asyncio.sleep(0.2)

    async def etcd_leader(self) -> str:
        """The member that leads etcd. Raises LabError when none does within 20 s."""
        async with asyncio.timeout(20):
            while True:
                members = json.loads(await self._etcdctl("endpoint", "status"))
                for number, member in enumerate(members, 1):
                    status = member["Status"]
                    if status["leader"] and status["leader"] == status["header"]["member_id"]:
                        return f"etcd{number}"
                await asyncio.sleep(0.2)

    async def _etcdctl(self, *arguments: str) -> str:
        endpoints = ",".join(f"http://{etcd_address(n)}:{CLIENT_PORT}" for n in range(1, CONFIG.etcd + 1))
        command = ["etcdctl", f"--endpoints={endpoints}", "-w", "json", *arguments]
        return (await asyncio.to_thread(self.fleet.node(OBSERVER).run, command)).stdout


def raise_fleet(fleet: Fleet) -> None:
    """Brings the fleet up. What is theirs, the hosts keep on a small disk of their own, so that it can be full."""
    with fleet.lab.locked():
        fleet.lab.save_config(CONFIG)
    for host in (fleet.host(name) for lane in LANES for name in lane.hosts):
        host.boot(CONFIG)
        _own_disk(host)
    fleet.up(hosts=CONFIG.hosts, controllers=CONFIG.controllers, etcd=CONFIG.etcd)


def disk_of(host: Host) -> Path:
    """Where a host's own disk is mounted, inside of the host."""
    return host.directory / "disk"


def _own_disk(host: Host) -> None:
    disk = disk_of(host)
    disk.mkdir(exist_ok=True)
    if host.node.run(["mountpoint", "-q", str(disk)], check=False).returncode == 0:
        return
    lines = [f"mount -t tmpfs -o size={DISK_MIB}m,mode=755 tmpfs {disk}"]
    seen_as = {"slot-a/var/lib/libvirt": "/var/lib/libvirt", "slot-a/var/log/libvirt": "/var/log/libvirt"}
    for part in _AGENT_FILES:
        (host.directory / part).mkdir(parents=True, exist_ok=True)
        where = seen_as.get(part, str(host.directory / part))
        lines += [f"mkdir -p {disk}/{part}", f"mount --bind {disk}/{part} {where}"]
    host.node.run(["sh", "-e"], stdin="\n".join(lines))


def qemus(host: Host, guest: str) -> list[int]:
    """Every QEMU process of a guest on a host, libvirt or not."""
    mark = f"guest={guest},debug-threads=on".encode()
    return [pid for pid, command in _commands(host) if mark in command and b"qemu" in command[0]]


def storage_daemons(host: Host) -> list[int]:
    """Every process on a host that gives images to others."""
    return [pid for pid, command in _commands(host) if command[0].endswith((b"qemu-storage-daemon", b"qemu-nbd"))]


def _commands(host: Host) -> Iterator[tuple[int, list[bytes]]]:
    """Each process of a host, with its command line."""
    node = host.node.pid()
    if node is None:
        return
    namespace = str(Path(f"/proc/{node}/ns/pid").readlink())
    for process in processes():
        if process.namespace == namespace:
            try:
                yield process.pid, Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue


def freeze(pids: Iterable[int]) -> None:
    """SIGSTOP; one that is gone stays so."""
    _signal(pids, signal.SIGSTOP)


def thaw(pids: Iterable[int]) -> None:
    """SIGCONT; one that is gone stays so."""
    _signal(pids, signal.SIGCONT)


def kill(pids: Iterable[int]) -> None:
    """SIGKILL; one that is gone stays so."""
    _signal(pids, signal.SIGKILL)


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
