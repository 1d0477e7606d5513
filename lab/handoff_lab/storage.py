"""The lab's storage host: network volumes, and who may open each.

Its own network, 10.50.0.0/24, leads to every host. A volume is a raw image behind an NBD server of its own, so that it
has a port by which its access list is enforced (storage_daemon.py). The node is started with the first volume.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc

from handoff.storage.v1.access_pb2 import GrantAccessRequest, ListAccessRequest, RevokeAccessRequest, Volume
from handoff.storage.v1.access_pb2_grpc import VolumeAccessServiceStub
from handoff_lab.daemon import Daemon
from handoff_lab.errors import LabError
from handoff_lab.etcd import plug_management
from handoff_lab.fabric import MANAGEMENT_NET, STORAGE_NET, Fabric
from handoff_lab.host import hosts_file
from handoff_lab.images import make_image
from handoff_lab.node import Node
from handoff_lab.pattern import Pattern
from handoff_lab.state import Lab, write_atomically

STORAGE_HOST = 100
FIRST_PORT, LAST_PORT = 10809, 10899
SERVICE_PORT = 7702
CALL_S = 10.0
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class VolumeFile:
    """A volume as its record on the storage host says. `hosts`: those that may open it."""

    name: str
    port: int
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Storage:
    """The storage host."""

    lab: Lab

    @property
    def name(self) -> str:
        """Always storage."""
        return "storage"

    @property
    def node(self) -> Node:
        """Its namespaces."""
        return Node(self.lab, self.name)

    @property
    def address(self) -> str:
        """Where it serves volumes."""
        return f"{STORAGE_NET}.{STORAGE_HOST}"

    @property
    def service(self) -> str:
        """Where it takes orders, on the management network."""
        return f"{MANAGEMENT_NET}.120:{SERVICE_PORT}"

    @property
    def volumes(self) -> Path:
        """The images, and a record of each."""
        return self.node.directory / "volumes"

    @property
    def exists(self) -> bool:
        """Whether the lab has had a volume yet."""
        return self.volumes.exists()

    @property
    def _socket(self) -> Path:
        return self.node.directory / "run/storage.sock"

    def daemons(self) -> dict[str, Daemon]:
        """Just the access daemon; the NBD servers go on when it ends."""
        arguments = (
            *(sys.executable, "-m", "handoff_lab.storage_daemon", str(self.volumes), self.address),
            *(self.service, f"unix:{self._socket}"),
        )
        return {"storage": Daemon(self.node, "storage", arguments, self._socket)}

    def start(self, fabric: Fabric) -> None:
        """Starts whatever of it does not run."""
        own = self.node.directory
        if self.node.pid() is None:
            shutil.rmtree(own / "run", ignore_errors=True)  # as a reboot does
        for part in ("etc", "run", "log", "volumes"):
            (own / part).mkdir(parents=True, exist_ok=True)
        (own / "etc/hosts").write_text(hosts_file())
        pid = self.node.start([(own / "run", "/run"), (own / "etc/hosts", "/etc/hosts")])
        cables = fabric.cables()
        plug_management(self.node, self.service.partition(":")[0], fabric, cables)
        if fabric.plug_storage(self.node, pid, cables):
            self.node.run(["sh", "-e"], stdin=f"ip addr replace {self.address}/24 dev sto0\nip link set sto0 up\n")
        self.daemons()["storage"].start()

    def create(self, name: str, pattern: Pattern) -> VolumeFile:
        """Makes a volume that nobody may open yet. Raises LabError when it exists."""
        taken = {one.port for one in read_volumes(self.volumes)}
        port = next((port for port in range(FIRST_PORT, LAST_PORT + 1) if port not in taken), None)
        if port is None:
            raise LabError("the storage host has no port left: delete a guest with a volume first")
        make_image(self.volumes / f"{name}.raw", "raw", pattern)
        volume = VolumeFile(name, port)
        write_volume(self.volumes, volume)
        return volume

    def volume(self, name: str) -> VolumeFile:
        """A volume. Raises LabError when there is none."""
        for volume in read_volumes(self.volumes):
            if volume.name == name:
                return volume
        raise LabError(f"there is no volume {name}")

    def delete(self, name: str) -> None:
        """Removes a volume, and ends its server. Nothing happens when there is none."""
        (self.volumes / f"{name}.json").unlink(missing_ok=True)
        if self.node.pid() is not None and self.daemons()["storage"].ready():
            self.access()  # the daemon sees what is gone
        (self.volumes / f"{name}.raw").unlink(missing_ok=True)

    def grant(self, name: str, host: str) -> None:
        """Lets a host open a volume. Raises LabError."""
        request = GrantAccessRequest(volume=Volume(protocol="nbd", name=name), host=host)
        self._ask(lambda stub: stub.GrantAccess(request, timeout=CALL_S))

    def revoke(self, name: str, host: str) -> None:
        """Shuts a host out of a volume. Raises LabError."""
        request = RevokeAccessRequest(volume=Volume(protocol="nbd", name=name), host=host)
        self._ask(lambda stub: stub.RevokeAccess(request, timeout=CALL_S))

    def access(self) -> dict[str, tuple[str, ...]]:
        """The hosts that may open each volume. Raises LabError."""
        answer = self._ask(lambda stub: stub.ListAccess(ListAccessRequest(), timeout=CALL_S))
        return {one.name: tuple(one.hosts) for one in answer.lists}

    def _ask(self, call: Callable[[VolumeAccessServiceStub], Answer]) -> Answer:
        try:
            with grpc.insecure_channel(f"unix:{self._socket}") as channel:
                return call(VolumeAccessServiceStub(channel))
        except grpc.RpcError as error:
            raise LabError(f"storage: {error.details() if isinstance(error, grpc.Call) else error}") from error


def read_volumes(directory: Path) -> list[VolumeFile]:
    """The volumes that a directory has records of, by name."""
    records = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    return [VolumeFile(one["name"], one["port"], tuple(one["hosts"])) for one in records]


def write_volume(directory: Path, volume: VolumeFile) -> None:
    """Records a volume."""
    record = {"name": volume.name, "port": volume.port, "hosts": sorted(volume.hosts)}
    write_atomically(directory / f"{volume.name}.json", json.dumps(record))
