"""The whole lab: up, down, and what runs."""

import dataclasses
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from handoff_lab.controller import Controller
from handoff_lab.daemon import Daemon
from handoff_lab.errors import LabError
from handoff_lab.etcd import EtcdMember
from handoff_lab.fabric import Fabric, Link
from handoff_lab.gateway import Gateway
from handoff_lab.host import HOST_TYPES, Host, host_index, program
from handoff_lab.node import Node, all_marked, kill_and_wait, nodes
from handoff_lab.parallel import in_parallel
from handoff_lab.state import MAX_CONTROLLERS, MAX_HOSTS, Lab, LabConfig
from handoff_lab.storage import Storage

Member: TypeAlias = Host | Controller | EtcdMember | Gateway | Storage
Step: TypeAlias = Callable[[], object]


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One node: its pid (None when it is down) and the pid of each daemon (None when that does not run)."""

    name: str
    pid: int | None
    daemons: dict[str, int | None]
    link: Link | None


@dataclass(frozen=True, slots=True)
class Fleet:
    """All nodes of a lab."""

    lab: Lab

    @property
    def fabric(self) -> Fabric:
        """The network between them."""
        return Fabric(self.lab)

    @property
    def storage(self) -> Storage:
        """The storage host; one of the members once there has been a volume."""
        return Storage(self.lab)

    def members(self, config: LabConfig) -> list[Member]:
        """Every node but the fabric."""
        return [
            *(Host(self.lab, n) for n in range(1, config.hosts + 1)),
            *(EtcdMember(self.lab, n, config.etcd) for n in range(1, config.etcd + 1)),
            *(Controller(self.lab, n) for n in range(1, config.controllers + 1)),
            Gateway(self.lab),
            *([self.storage] if self.storage.exists else []),
        ]

    def member(self, name: str) -> Member:
        """A node by name. Raises LabError for one that the lab does not have."""
        members = {member.name: member for member in self.members(self.lab.require_config())}
        if name not in members:
            raise LabError(f"the lab has no node {name}: there are {', '.join(members)}")
        return members[name]

    def host(self, name: str) -> Host:
        """A host by name. Raises LabError for one that the lab does not have."""
        config = self.lab.require_config()
        if host_index(name) > config.hosts:
            raise LabError(f"the lab has no host {name}, only {config.hosts}: add it with `handoff-lab up --hosts …`")
        return Host(self.lab, host_index(name))

    def daemon(self, node: str, daemon: str) -> Daemon:
        """A daemon by node and name. Raises LabError for one that does not exist."""
        daemons = self.member(node).daemons()
        if daemon not in daemons:
            raise LabError(f"{node} has no daemon {daemon}: there are {', '.join(daemons)}")
        return daemons[daemon]

    def restart(self, node: str, daemon: str) -> None:
        """Restarts one daemon and waits until it is ready."""
        member = self.member(node)
        if isinstance(member, Host):
            member.restart(daemon)
        else:
            self.daemon(node, daemon).restart()

    def up(
        self,
        hosts: int | None = None,
        controllers: int | None = None,
        etcd: int | None = None,
        host_memory_mib: int | None = None,
        agents: bool | None = None,
    ) -> LabConfig:
        """Starts all that is missing, and returns what the lab is now.

        What is None stays as it is, or is the default in a new lab. A running lab can get more hosts and controllers.
        """
        require_set_up(self.lab)
        with self.lab.locked():
            old = self.lab.config()
            config = _merge(old, hosts, controllers, etcd, host_memory_mib, agents)
            self.lab.save_config(config)
            self._start(config)
        return config

    def _start(self, config: LabConfig) -> None:
        members = self.members(config)
        hosts = [member for member in members if isinstance(member, Host)]
        members_of_etcd = [member for member in members if isinstance(member, EtcdMember)]
        controllers = [member for member in members if isinstance(member, Controller)]
        gateways = [member for member in members if isinstance(member, Gateway)]
        reconfigured = [controller for controller in controllers if controller.write_files(config)]
        boots: list[Step] = [self.fabric.start]
        boots += [partial(host.boot, config) for host in hosts]
        boots += [*(member.boot for member in members_of_etcd), *(controller.boot for controller in controllers)]
        boots += [gateway.boot for gateway in gateways]
        in_parallel(boots)
        if self.storage.exists:
            self.storage.start(self.fabric)
        cables = self.fabric.cables()
        cabling: list[Step] = [partial(host.connect, self.fabric, cables, config) for host in hosts]
        cabling += [partial(member.connect, self.fabric, cables) for member in members_of_etcd]
        cabling += [partial(controller.connect, self.fabric, cables) for controller in controllers]
        cabling += [partial(gateway.connect, self.fabric, cables, config) for gateway in gateways]
        in_parallel(cabling)
        starts: list[Step] = [partial(host.start_daemons, config) for host in hosts]
        starts += [member.daemons()["etcd"].start for member in members_of_etcd]
        in_parallel(starts)
        if config.agents:
            for controller in reconfigured:
                controller.daemons()["controller"].stop()
            in_parallel([controller.daemons()["controller"].start for controller in controllers])

    def down(self) -> None:
        """Ends everything and removes every file; also what a crash left behind."""
        if self.lab.directory.exists():
            with self.lab.locked():
                self._remove()
        else:
            self._remove()

    def _remove(self) -> None:
        # Twice: a node that was being started while we looked shows up in the second look.
        while marked := all_marked(self.lab):
            kill_and_wait(marked)
        if self.lab.directory.exists():
            shutil.rmtree(self.lab.directory)

    def power_off(self, host: str) -> None:
        """Cuts a host's power: everything in it is gone at once."""
        self.host(host).node.kill()

    def set_rate(self, host: str, rate: str) -> None:
        """Limits a host's overlay link both ways, such as "1gbit"; "none" lifts the limit. Stays over a power-off."""
        with self.lab.locked():
            node = self.host(host).node
            self.fabric.set_rate(node, rate)
            config = self.lab.require_config()
            rates = {name: old for name, old in config.rates.items() if name != host}
            self.lab.save_config(dataclasses.replace(config, rates=rates if rate == "none" else {**rates, host: rate}))

    def set_type(self, host: str, kind: str) -> None:
        """Makes a host one of another type, see HOST_TYPES, and restarts its agent. Stays over a power-off."""
        if kind not in HOST_TYPES:
            raise LabError(f"{kind} is no type of host: there are {', '.join(HOST_TYPES)}")
        with self.lab.locked():
            member = self.host(host)
            config = self.lab.require_config()
            config = dataclasses.replace(config, types={**config.types, host: kind})
            self.lab.save_config(config)
            member.write_files(config)
            if config.agents and member.node.pid() is not None:
                member.restart("agent")

    def set_link(self, host: str, up: bool, management: bool = True, overlay: bool = True) -> None:
        """Cuts or mends a host's cables."""
        self.fabric.set_up(self.host(host).name, up, management, overlay)

    def status(self) -> list[NodeStatus]:
        """Every node with its daemons."""
        config = self.lab.require_config()
        running = nodes(self.lab)
        links = self.fabric.links()
        found = [NodeStatus("fabric", running.get("fabric"), {}, None)]
        for member in self.members(config):
            names = member.daemons()
            up = member.name in running
            pids = {name: daemon.pid() if up else None for name, daemon in names.items()}
            found.append(NodeStatus(member.name, running.get(member.name), pids, links.get(member.name)))
        return found

    def environment(self) -> dict[str, str]:
        """What a shell needs to use the lab: PATH and HANDOFF_CONTROLLER."""
        config = self.lab.require_config()
        sockets = [self.lab.controller_socket(f"ctl{n}") for n in range(1, config.controllers + 1)]
        return {
            "PATH": f"{program('')}:{os.environ.get('PATH', '')}",
            "HANDOFF_CONTROLLER": ",".join(f"unix:{socket}" for socket in sockets),
        }

    def node(self, name: str) -> Node:
        """Any node by name, the fabric too."""
        return self.fabric.node if name == "fabric" else self.member(name).node


def require_root() -> None:
    """Raises LabError unless we are root."""
    if os.geteuid() != 0:
        raise LabError("the lab makes namespaces and interfaces: run it as root (sudo)")


def require_set_up(lab: Lab) -> None:
    """Raises LabError when something that setup installs is missing."""
    needed = [lab.releases_file, lab.guest_kernel, lab.guest_initrd, lab.probe_program, lab.switch_room]
    missing = [str(path) for path in needed if not path.exists()]
    missing += [
        name for name in ("libvirtd", "virsh", "ovs-vswitchd", "etcd", "qemu-img") if shutil.which(name) is None
    ]
    if missing:
        raise LabError(f"the machine is not set up ({', '.join(missing)}): run `make setup`")


def _merge(
    old: LabConfig | None,
    hosts: int | None,
    controllers: int | None,
    etcd: int | None,
    host_memory_mib: int | None,
    agents: bool | None,
) -> LabConfig:
    """The lab that is wanted. Raises LabError for what a running lab can't become."""
    base = old or LabConfig()
    new = LabConfig(
        hosts=base.hosts if hosts is None else hosts,
        controllers=base.controllers if controllers is None else controllers,
        etcd=base.etcd if etcd is None else etcd,
        host_memory_mib=base.host_memory_mib if host_memory_mib is None else host_memory_mib,
        agents=base.agents if agents is None else agents,
        rates=base.rates,
        types=base.types,
    )
    for what, value, most in (("hosts", new.hosts, MAX_HOSTS), ("controllers", new.controllers, MAX_CONTROLLERS)):
        if not 1 <= value <= most:
            raise LabError(f"{value} {what}: there can be 1 to {most}")
    if new.etcd not in (1, 3):
        raise LabError(f"{new.etcd} etcd members: there can be 1 or 3")
    if old is not None:
        if new.etcd != old.etcd:
            raise LabError(f"the lab runs with {old.etcd} etcd member(s): `handoff-lab down` first to change that")
        if new.hosts < old.hosts or new.controllers < old.controllers:
            raise LabError(
                f"the lab has {old.hosts} hosts and {old.controllers} controllers: `handoff-lab down` first for fewer"
            )
        if new.host_memory_mib != old.host_memory_mib:
            raise LabError("the memory of running hosts can't be changed: `handoff-lab down` first")
    return new
