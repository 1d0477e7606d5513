"""An emulated hypervisor: libvirt in two slots, Open vSwitch in user space, and the agent.

Inside of host hN: mgmt0 10.10.0.N; on the overlay link br-ovl 10.20.0.N for migration streams, and br-phy 10.21.0.N for
VXLAN; sto0 10.50.0.N leads to the storage host; among the guests probe0 10.30.0.(200+N), red0 and blue0
10.40.0.(200+N). Streams stay in the kernel: Open vSwitch in user space takes about 30 MiB/s.
"""

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from handoff_lab.daemon import Daemon
from handoff_lab.errors import LabError
from handoff_lab.fabric import MANAGEMENT_NET, OVERLAY_MTU, OVERLAY_NET, STORAGE_NET, TUNNEL_NET, Fabric
from handoff_lab.networks import GATEWAY_NUMBER, MTU, NETWORKS, TENANT
from handoff_lab.node import Node
from handoff_lab.parallel import in_parallel
from handoff_lab.state import MAX_HOSTS, Lab, LabConfig

SLOTS = ("a", "b")
AGENT_PORT = 7701
# Where hosts of a type keep local disks, and in what format; empty: as at the source.
HOST_TYPES = {
    "standard": ("", ""),
    "ssd": ("/srv/ssd", "qcow2"),
    "ark": ("/srv/ark", "raw"),
    "raw": ("", "raw"),
    "qcow2": ("", "qcow2"),
}
LOCAL_FOLDERS = ("vms", "ssd", "ark")
HOSTS_FROM = 200
"""Address of host N in the guests' networks: this and N."""
OVS_DEADLINE_S = 15
# As lab/ovs/room.c gives the sockets: Open vSwitch in user space may have to wait for a processor.
SWITCH_QUEUE_PACKETS = 10_000

LIBVIRTD_CONF = """\
listen_tls = 0
listen_tcp = {tcp}
listen_addr = "{address}"
auth_tcp = "none"
auth_unix_ro = "none"
auth_unix_rw = "none"
host_uuid = "{uuid}"
keepalive_interval = 2
keepalive_count = 3
log_filters = "3:*"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
"""
QEMU_CONF = """\
user = "root"
group = "root"
security_driver = "none"
dynamic_ownership = 0
remember_owner = 0
cgroup_controllers = [ ]
namespaces = [ ]
seccomp_sandbox = 0
stdio_handler = "file"
migration_address = "{overlay}"
migration_host = "{overlay}"
keepalive_interval = 2
keepalive_count = 3
"""
# Bound over the machine's own in slot b; slot a lives in the host's mount namespace.
SLOT_B = """\
for directory in etc/libvirt var/lib/libvirt var/log/libvirt; do mount --bind "$1/$directory" "/$directory"; done
mount --bind /run/handoff/slots/b /run/libvirt
shift
exec "$@"
"""


def host_name(index: int) -> str:
    """The name of the host with this number, counted from 1."""
    return f"h{index}"


def host_index(name: str) -> int:
    """The number of a host, counted from 1. Raises LabError for a name that is no host's."""
    if len(name) == 2 and name[0] == "h" and name[1].isdecimal() and 1 <= int(name[1]) <= MAX_HOSTS:
        return int(name[1])
    raise LabError(f"{name} is not a host: hosts are h1 to h{MAX_HOSTS}")


def hosts_file() -> str:
    """/etc/hosts of every node."""
    lines = ["127.0.0.1 localhost"]
    lines += [f"{MANAGEMENT_NET}.{n} h{n}" for n in range(1, MAX_HOSTS + 1)]
    lines += [f"{MANAGEMENT_NET}.{100 + n} ctl{n}" for n in range(1, MAX_HOSTS + 1)]
    lines += [f"{MANAGEMENT_NET}.{110 + n} etcd{n}" for n in range(1, 4)]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class Host:
    """Host h`index`."""

    lab: Lab
    index: int

    @property
    def name(self) -> str:
        """h1 to h5."""
        return host_name(self.index)

    @property
    def node(self) -> Node:
        """Its namespaces."""
        return Node(self.lab, self.name)

    @property
    def directory(self) -> Path:
        """Everything of the host's on disk."""
        return self.node.directory

    def uuid(self, slot: str) -> str:
        """The host UUID that libvirt reports in a slot."""
        return f"00000000-0000-4000-8000-00000000{SLOTS.index(slot):02d}{self.index:02d}"

    def daemons(self) -> dict[str, Daemon]:
        """The host's daemons by name: libvirtd-a, libvirtd-b, ovsdb-server, ovs-vswitchd, agent."""
        run = self.directory / "run"
        ovs = ("-vconsole:off", "-vsyslog:off", "-vfile:info")
        database = ("/etc/openvswitch/conf.db", "--remote=punix:/run/openvswitch/db.sock", "--pidfile")
        daemons = [
            Daemon(
                self.node,
                "ovsdb-server",
                ("ovsdb-server", *database, "--log-file=/var/log/openvswitch/ovsdb-server.log", *ovs),
                run / "openvswitch/db.sock",
            ),
            Daemon(
                self.node,
                "ovs-vswitchd",
                (
                    *("ovs-vswitchd", "unix:/run/openvswitch/db.sock", "--disable-system", "--pidfile"),
                    *("--log-file=/var/log/openvswitch/ovs-vswitchd.log", *ovs),
                ),
                environment={"LD_PRELOAD": str(self.lab.switch_room)},
            ),
            Daemon(
                self.node,
                "libvirtd-a",
                ("libvirtd", "--listen", "-p", "/run/handoff/slots/a/libvirtd.pid"),
                self.lab.libvirt_socket(self.name, "a"),
            ),
            Daemon(
                self.node,
                "libvirtd-b",
                (
                    *("unshare", "-m", "--propagation", "slave", "sh", "-ec", SLOT_B, "sh"),
                    *(str(self.directory / "slot-b"), "libvirtd", "-p", "/run/handoff/slots/b/libvirtd.pid"),
                ),
                self.lab.libvirt_socket(self.name, "b"),
            ),
            Daemon(
                self.node,
                "agent",
                (str(program("handoff-agent")), "--config", "/etc/handoff/agent.toml"),
                self.lab.agent_socket(self.name),
            ),
        ]
        return {daemon.name: daemon for daemon in daemons}

    def write_files(self, config: LabConfig) -> None:
        """Writes the configuration of everything on the host."""
        for path in (
            *("run/libvirt", "run/lock", "run/openvswitch", "run/handoff/slots/a", "run/handoff/slots/b"),
            *("etc/handoff", "etc/openvswitch", "var/lib/openvswitch", "var/log/openvswitch", "agent", *LOCAL_FOLDERS),
            *(
                f"slot-{slot}/{part}"
                for slot in SLOTS
                for part in ("etc/libvirt", "var/lib/libvirt", "var/log/libvirt")
            ),
        ):
            (self.directory / path).mkdir(parents=True, exist_ok=True)
        for shared in (self.lab.shared, self.lab.directory / "cache/libvirt"):
            shared.mkdir(parents=True, exist_ok=True)
        management, overlay = f"{MANAGEMENT_NET}.{self.index}", f"{OVERLAY_NET}.{self.index}"
        for slot in SLOTS:
            settings = self.directory / f"slot-{slot}/etc/libvirt"
            listening = {"tcp": 1 if slot == "a" else 0, "address": management, "uuid": self.uuid(slot)}
            (settings / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(**listening))
            (settings / "qemu.conf").write_text(QEMU_CONF.format(overlay=overlay))
        (self.directory / "etc/machine-id").write_text(self.uuid("a").replace("-", "") + "\n")
        (self.directory / "etc/hosts").write_text(hosts_file())
        (self.directory / "etc/handoff/agent.toml").write_text(self._agent_toml(config))

    def _agent_toml(self, config: LabConfig) -> str:
        slots = "\n".join(
            f'[slots.{slot}]\nuri = "qemu+unix:///system?socket=/run/handoff/slots/{slot}/libvirt-sock"\n'
            for slot in SLOTS
        )
        emulators = "\n".join(
            f'[[emulators]]\nname = "{release.name}"\npath = "{release.emulator}"\n' for release in self.lab.releases()
        )
        types = "\n".join(
            f'[host_types.{kind}]\nfolder = "{folder}"\nformat = "{image_format}"\n'
            for kind, (folder, image_format) in HOST_TYPES.items()
        )
        return f"""\
name = "{self.name}"
listen = ["{MANAGEMENT_NET}.{self.index}:{AGENT_PORT}", "unix:{self.lab.agent_socket(self.name)}"]
migration_address = "{OVERLAY_NET}.{self.index}"
state_dir = "{self.directory / "agent"}"
shared_paths = ["/srv/shared"]
memory_mib = {config.host_memory_mib}
host_type = "{config.types.get(self.name, "standard")}"

{types}
[network]
tunnel_address = "{TUNNEL_NET}.{self.index}"

{slots}
{emulators}"""

    def boot(self, config: LabConfig) -> None:
        """Starts the host's namespaces, unless they run."""
        if self.node.pid() is None:
            shutil.rmtree(self.directory / "run", ignore_errors=True)  # as a reboot does
            self.write_files(config)
            self.node.start(self._binds(), own_srv=True)

    def _binds(self) -> list[tuple[Path, str]]:
        own = self.directory
        return [
            (own / "run", "/run"),
            (own / "run/handoff/slots/a", "/run/libvirt"),
            (own / "slot-a/etc/libvirt", "/etc/libvirt"),
            (own / "slot-a/var/lib/libvirt", "/var/lib/libvirt"),
            (own / "slot-a/var/log/libvirt", "/var/log/libvirt"),
            (self.lab.directory / "cache/libvirt", "/var/cache/libvirt"),
            (own / "etc/openvswitch", "/etc/openvswitch"),
            (own / "var/lib/openvswitch", "/var/lib/openvswitch"),
            (own / "var/log/openvswitch", "/var/log/openvswitch"),
            (own / "etc/machine-id", "/etc/machine-id"),
            (own / "etc/hosts", "/etc/hosts"),
            (own / "etc/handoff", "/etc/handoff"),
            *((own / folder, f"/srv/{folder}") for folder in LOCAL_FOLDERS),
            (self.lab.shared, "/srv/shared"),
        ]

    def connect(self, fabric: Fabric, cables: frozenset[str], config: LabConfig) -> None:
        """Plugs the host in where it is not, and gives its interfaces their addresses."""
        if fabric.plug_storage(self.node, self.node.require_pid(), cables):
            self.node.run(
                ["sh", "-e"], stdin=f"ip addr replace {STORAGE_NET}.{self.index}/24 dev sto0\nip link set sto0 up\n"
            )
        if not fabric.plug(self.node, self.node.require_pid(), True, cables):
            return
        self.node.run(
            ["sh", "-e"],
            stdin=f"""
sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv4.conf.all.arp_ignore=1
sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0
ip addr replace {MANAGEMENT_NET}.{self.index}/24 dev mgmt0
ip link set mgmt0 up
# Its own after a reboot too, as its cables': the others know it by this for half a minute without asking again.
ip link show br-ovl >/dev/null 2>&1 ||
    ip link add br-ovl address 02:00:00:11:00:{self.index:02x} mtu {OVERLAY_MTU} type bridge
ip link show vtep0 >/dev/null 2>&1 || ip link add vtep0 mtu {OVERLAY_MTU} type veth peer name vtep1 mtu {OVERLAY_MTU}
ip link set vtep0 master br-ovl up
ip link set ovl0 master br-ovl up
ip addr replace {OVERLAY_NET}.{self.index}/24 dev br-ovl
ip link set br-ovl up
# br-phy has the tunnels' address; the kernel must not answer for it on the link below.
ip link set vtep1 arp off up
ethtool -K vtep1 tx off rx off tso off gso off gro off >/dev/null
ethtool -K vtep0 tx off tso off gso off gro off >/dev/null
""",
        )
        if self.name in config.rates:
            fabric.set_rate(self.node, config.rates[self.name])

    def start_daemons(self, config: LabConfig) -> None:
        """Starts every daemon that does not run, and waits until all are ready."""
        daemons = self.daemons()
        for slot in SLOTS:
            daemons[f"libvirtd-{slot}"].launch()
        in_parallel([self._start_ovs, *(daemons[f"libvirtd-{slot}"].wait_ready for slot in SLOTS)])
        if config.agents:
            daemons["agent"].start()

    def restart(self, daemon: str) -> None:
        """Restarts one daemon; Open vSwitch also gets its bridges back."""
        daemons = self.daemons()
        if daemon not in daemons:
            raise LabError(f"{self.name} has no daemon {daemon}: there are {', '.join(daemons)}")
        daemons[daemon].stop()
        if daemon.startswith("ovs"):
            self._start_ovs()
        else:
            daemons[daemon].start()

    def _start_ovs(self) -> None:
        daemons = self.daemons()
        ready = self.directory / "run/ovs-ready"
        if ready.exists() and daemons["ovsdb-server"].pid() is not None and daemons["ovs-vswitchd"].pid() is not None:
            return
        fresh = not (self.directory / "etc/openvswitch/conf.db").exists()
        if fresh:
            schema = "/usr/share/openvswitch/vswitch.ovsschema"
            self.node.run(["ovsdb-tool", "create", "/etc/openvswitch/conf.db", schema])
        daemons["ovsdb-server"].start()
        if fresh:
            self.node.run(["ovs-vsctl", "--no-wait", "init"])
        elif daemons["ovs-vswitchd"].pid() is None:
            # Taps of guests that died with the host: their ports would only log errors.
            self._remove_dead_taps()
        daemons["ovs-vswitchd"].launch()
        self.node.run(["ovs-vsctl", f"--timeout={OVS_DEADLINE_S}", *self._bridges()])
        self.node.run(
            ["sh", "-e"],
            stdin=f"""
ip addr replace {TUNNEL_NET}.{self.index}/24 dev br-phy
ip link set br-phy mtu {OVERLAY_MTU} up
ip link set br-int up
{self._looking()}ethtool -K br-phy tx off >/dev/null
""",
        )
        ready.touch()

    def _looking(self) -> str:
        """The commands that give the host its interfaces in the guests' networks."""
        number = HOSTS_FROM + self.index
        return "".join(
            f"""\
ip link set {network.interface} mtu {MTU} address {network.own_mac(number)} txqueuelen {SWITCH_QUEUE_PACKETS}
ip addr replace {network.address(number)}/24 dev {network.interface} metric {network.metric}
ip link set {network.interface} up
ethtool -K {network.interface} tx off >/dev/null
"""
            for network in NETWORKS
        )

    def _remove_dead_taps(self) -> None:
        ports = self.node.run(["ovs-vsctl", "--no-wait", "list-ports", "br-int"], check=False).stdout.split()
        dead = [p for p in ports if p.startswith("vnet") and not self._has_interface(p)]
        for port in dead:
            self.node.run(["ovs-vsctl", "--no-wait", "--if-exists", "del-port", port])

    def _has_interface(self, name: str) -> bool:
        return self.node.run(["ip", "link", "show", "dev", name], check=False).returncode == 0

    def _bridges(self) -> list[str]:
        """ovs-vsctl's arguments: a bridge for tunnels, and one for guests with a VXLAN port to every other host."""
        # ovs-vsctl waits for ovs-vswitchd only when it changed something; after a restart it would not.
        words = (
            f"set Open_vSwitch . external_ids:handoff-lab-start={time.time_ns()}"
            " -- --may-exist add-br br-phy -- set bridge br-phy datapath_type=netdev"
            f" other_config:hwaddr=02:00:00:20:00:{self.index:02x}"
            " -- --may-exist add-port br-phy vtep1"
            " -- --may-exist add-br br-int -- set bridge br-int datapath_type=netdev"
        )
        for network in NETWORKS:
            name, mac = network.interface, network.own_mac(HOSTS_FROM + self.index)
            words += f' -- --may-exist add-port br-int {name} -- set interface {name} type=internal mac="{mac}"'
        peers = {f"vx{n}": n for n in range(1, MAX_HOSTS + 1) if n != self.index} | {"vxgw": GATEWAY_NUMBER}
        for port, peer in peers.items():
            # Protected: what came out of one tunnel is not sent into another, or a full mesh would storm.
            words += (
                f" -- --may-exist add-port br-int {port} -- set interface {port} type=vxlan"
                f" options:remote_ip={TUNNEL_NET}.{peer} options:key={TENANT.tunnel} ofport_request={100 + peer}"
                f" -- set port {port} protected=true"
            )
        return words.split()


def program(name: str) -> Path:
    """One of our own programs, from the environment that runs the lab."""
    return Path(sys.prefix) / "bin" / name
