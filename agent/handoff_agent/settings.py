"""The agent's configuration file, by default /etc/handoff/agent.toml."""

import os
from ipaddress import IPv4Address
from pathlib import Path
from typing import Literal

from pydantic import Field

from handoff_agent.disks.plan import Place
from handoff_common.config import Settings
from handoff_common.logs import LogFormat

# What the host itself needs, when the file does not say what guests may use.
HOST_RESERVE_BYTES = 1 << 30


class SlotSettings(Settings):
    """One of the host's libvirt daemons."""

    uri: str = Field(description='libvirt URI, such as "qemu+unix:///system?socket=/run/libvirt/libvirt-sock"')


class EmulatorSettings(Settings):
    """One installed QEMU build."""

    name: str = Field(description="what operators call it")
    path: str = Field(description="the binary")


class HostTypeSettings(Settings):
    """Where hosts of one type keep disks that are local to them."""

    folder: str = Field(default="", pattern="^(/.*)?$", description="folder of their images; default: as at the source")
    format: Literal["", "raw", "qcow2"] = Field(default="", description="their format; default: as at the source")


class NetworkSettings(Settings):
    """The tenants' networks, where the agent manages their flows."""

    bridge: str = Field(default="br-int", description="bridge that guests are plugged into")
    tunnel_port: str = Field(default="handoff0", max_length=15, description="its VXLAN port, made by the agent")
    tunnel_address: IPv4Address = Field(description="this host's address for VXLAN")
    openflow: Path | None = Field(default=None, description="the bridge's management socket; default: OVS's own")

    def management_socket(self) -> Path:
        """Where the bridge takes OpenFlow connections."""
        return self.openflow or Path(f"/run/openvswitch/{self.bridge}.mgmt")


class AgentSettings(Settings):
    """Everything that an agent is told."""

    name: str = Field(default_factory=lambda: os.uname().nodename, description="the host's name in the fleet")
    listen: tuple[str, ...] = Field(
        default=("0.0.0.0:7701", "unix:/run/handoff/agent.sock"),
        min_length=1,
        description='gRPC addresses: "host:port" or "unix:/path"',
    )
    migration_address: str = Field(description="address of this host that migration streams come in on")
    migration_ports: tuple[int, int] = Field(default=(49152, 49215), description="first and last port for them")
    state_dir: Path = Field(default=Path("/var/lib/handoff/agent"), description="the agent's own records")
    runtime_dir: Path = Field(default=Path("/run/handoff"), description="sockets of upgrades, seen by all slots")
    qemu_user: str = Field(default="root", description="user that libvirt runs QEMU as; owns the sockets of upgrades")
    shared_paths: tuple[str, ...] = Field(default=(), description="directories with the same content on other hosts")
    host_type: str = Field(default="standard", description='what kind of host this is: "standard", "ssd", "ark"…')
    host_types: dict[str, HostTypeSettings] = Field(
        default={}, description="where local disks of guests that come here are kept, by type of host"
    )
    disk_tls: Path | None = Field(
        default=None,
        description="folder with this host's x509 credentials for disks that are copied, by QEMU's names (ca-cert.pem,"
        " server-cert.pem, server-key.pem, client-cert.pem, client-key.pem); default: no TLS",
    )
    memory_mib: int | None = Field(
        default=None, gt=0, description="memory that guests may use; default: all but 1 GiB of the machine's"
    )
    graphics_address: str | None = Field(
        default=None,
        description="address that moved guests' displays get if they listen on one address of another host; default:"
        " migration_address",
    )
    ovs_database: str = Field(default="unix:/run/openvswitch/db.sock", description="Open vSwitch's database")
    network: NetworkSettings | None = Field(default=None, description="absent: the agent touches no flows")
    slots: dict[str, SlotSettings] = Field(min_length=1, description="libvirt daemons by name: a, and b for upgrades")
    emulators: tuple[EmulatorSettings, ...] = Field(default=(), description="QEMU builds; probed at start")
    log_format: LogFormat = "json"
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")

    def place_of_disks(self) -> Place:
        """Where this host keeps local disks."""
        kept = self.host_types.get(self.host_type, HostTypeSettings())
        return Place(folder=kept.folder, format=kept.format)

    def guest_memory_bytes(self) -> int:
        """Memory that guests may use, in bytes."""
        if self.memory_mib is not None:
            return self.memory_mib << 20
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") - HOST_RESERVE_BYTES
