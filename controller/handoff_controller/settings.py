"""The controller's configuration file, by default /etc/handoff/controller.toml."""

import os
from ipaddress import IPv4Address
from typing import Self

from pydantic import Field, model_validator

from handoff_common.config import Settings
from handoff_common.logs import LogFormat


class EtcdSettings(Settings):
    """Where the records are."""

    endpoints: tuple[str, ...] = Field(min_length=1, description='members, each "ipv4:port"')
    lease_ttl_s: int = Field(
        default=6,
        ge=6,
        description="how long a dead leader keeps its place; below 6 s live leases are lost when a member was frozen",
    )


class AdmissionSettings(Settings):
    """How much may go on at once."""

    max_parallel_per_pair: int = Field(default=1, ge=1, description="migrations between the same two hosts")
    max_upgrades_per_host: int = Field(default=2, ge=1, description="upgrades of guests on one host")


class VolumeSettings(Settings):
    """Who keeps the access lists of some network volumes; see volumes.py. Either a service or a command."""

    protocol: str = Field(default="*", description='libvirt\'s protocol, such as "nbd" or "rbd"; * and ? match')
    name: str = Field(default="*", description="name of the volumes; * and ? match")
    service: str = Field(default="", description='"host:port" of a handoff.storage.v1.VolumeAccessService')
    command: tuple[str, ...] = Field(default=(), description="run with: grant|revoke PROTOCOL:NAME HOST")
    timeout_s: float = Field(default=10.0, gt=0, description="for one volume and one host")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if bool(self.service) == bool(self.command):
            raise ValueError("volumes: name either a service or a command")
        return self


class FencingSettings(Settings):
    """How it is made sure that a host that does not answer runs no guest."""

    command: tuple[str, ...] = Field(
        default=(),
        description='command that turns a host off, "{host}" in it is its name; status 0: it is off for certain',
    )
    deadline_s: float = Field(default=20.0, gt=0, description="how long it may take")
    automatic_after_s: float = Field(
        default=0.0,
        ge=0,
        description="fence without being asked when a committed guest's host has been silent for so long; 0: never",
    )

    @model_validator(mode="after")
    def _names_the_host(self) -> Self:
        if self.command and not any("{host}" in word for word in self.command):
            raise ValueError("fencing.command: {host} is in none of its words: it can't know what to turn off")
        return self


class RetentionSettings(Settings):
    """How long migrations that have ended are remembered. The newest `count` are, and those younger than `age_s`."""

    count: int = Field(default=1000, ge=0, description="so many, however old")
    age_s: float = Field(default=30 * 24 * 3600.0, ge=0, description="all that ended so recently")


class StaticPortSettings(Settings):
    """A port of a tenant that is no guest's: a gateway, a monitor."""

    mac: str = Field(pattern="^[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}$", description="its MAC address")
    tunnel: int = Field(ge=1, lt=1 << 24, description="VXLAN network id of its tenant")
    ips: tuple[IPv4Address, ...] = Field(default=(), description="its addresses")
    any_source: bool = Field(default=False, description="a router: frames with any source may come from it")
    host: str = Field(default="", description="host on whose bridge it is")
    interface: str = Field(default="", description="name of its interface there")
    vtep: IPv4Address | None = Field(default=None, description="instead: VXLAN address of a machine without an agent")

    @model_validator(mode="after")
    def _is_somewhere(self) -> Self:
        if bool(self.host) != bool(self.interface) or bool(self.host) == (self.vtep is not None):
            raise ValueError("say where it is: either host and interface, or vtep")
        return self


class ControllerSettings(Settings):
    """Everything that a controller is told."""

    name: str = Field(default_factory=lambda: os.uname().nodename, description="this replica's name")
    listen: tuple[str, ...] = Field(
        default=("0.0.0.0:7700", "unix:/run/handoff-controller/controller.sock"),
        min_length=1,
        description='gRPC addresses: "host:port" or "unix:/path"',
    )
    advertise: str = Field(description='address on which other replicas reach this one, "host:port"')
    etcd: EtcdSettings
    hosts: dict[str, str] = Field(min_length=1, description='agents by host name, each "host:port" or "unix:/path"')
    static_ports: tuple[StaticPortSettings, ...] = Field(default=(), description="tenants' ports that are no guests")
    admission: AdmissionSettings = AdmissionSettings()
    volumes: tuple[VolumeSettings, ...] = Field(
        default=(), description="access lists of network volumes, the first that matches; without, every host may"
    )
    fencing: FencingSettings = FencingSettings()
    keep_migrations: RetentionSettings = RetentionSettings()
    log_format: LogFormat = "json"
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")
