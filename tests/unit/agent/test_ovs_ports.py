"""Ports from a real Open vSwitch database."""

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from handoff.agent.v1 import flow_pb2, types_pb2
from handoff_agent import ovs_ports
from handoff_agent.flow_service import FlowService
from handoff_agent.ovs_ports import GuestPort, OvsPorts
from handoff_common.errors import DeadlineError, PreconditionError

GUEST = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"
OTHER = "11111111-2222-3333-4444-555555555555"


class NobodyAsks:
    """Reading needs no term."""

    async def admit(self, fence: types_pb2.Fence) -> None:
        raise AssertionError(fence)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[str]:
    socket_path = tmp_path / "db.sock"
    schema = "/usr/share/openvswitch/vswitch.ovsschema"
    subprocess.run(["ovsdb-tool", "create", tmp_path / "conf.db", schema], check=True)
    server = subprocess.Popen(
        [
            "ovsdb-server",
            f"{tmp_path}/conf.db",
            f"--remote=punix:{socket_path}",
            f"--unixctl={tmp_path}/ctl",
            "--no-chdir",
            "-vconsole:off",
            "-vfile:off",
            "-vsyslog:off",
        ],
        stdin=subprocess.DEVNULL,
    )
    try:
        remote = f"unix:{socket_path}"
        subprocess.run(["ovs-vsctl", f"--db={remote}", "--no-wait", "--retry", "--timeout=10", "init"], check=True)
        yield remote
    finally:
        server.terminate()
        server.wait(10)


def plug(database: str, bridge: str, name: str, *columns: str) -> None:
    command = ["--may-exist", "add-br", bridge, "--", "add-port", bridge, name]
    if columns:
        command += ["--", "set", "Interface", name, *columns]
    subprocess.run(["ovs-vsctl", f"--db={database}", "--no-wait", *command], check=True)


def plug_guest(database: str, bridge: str, name: str, uuid: str, mac: str, key: str = "vm-id") -> None:
    plug(database, bridge, name, f'external_ids:{key}="{uuid}"', f'external_ids:attached-mac="{mac}"')


def set_interface(database: str, name: str, column: str) -> None:
    subprocess.run(["ovs-vsctl", f"--db={database}", "--no-wait", "set", "Interface", name, column], check=True)


async def test_ports_of_guests(database: str) -> None:
    ports = OvsPorts(database)
    assert await ports.read() == ()
    plug(database, "br-int", "uplink")
    plug_guest(database, "br-int", "vnet1", OTHER, "52:54:00:00:00:02")
    plug_guest(database, "br-ext", "vnet0", GUEST, "52:54:00:AA:00:01", key="vm-uuid")
    set_interface(database, "vnet1", "ofport=7")
    assert await ports.read() == (
        GuestPort("vnet0", "br-ext", -1, "52:54:00:aa:00:01", GUEST),
        GuestPort("vnet1", "br-int", 7, "52:54:00:00:00:02", OTHER),
    )
    ports.close()


async def test_service_filters_by_domain(database: str) -> None:
    plug_guest(database, "br-int", "vnet0", GUEST, "52:54:00:00:00:01")
    plug_guest(database, "br-int", "vnet1", OTHER, "52:54:00:00:00:02")
    service = FlowService(OvsPorts(database), None, NobodyAsks())

    async def names(uuid: str) -> list[str]:
        request = flow_pb2.ListPortsRequest(domain_uuid=uuid)
        answer = await service.ListPorts(request, None)  # type: ignore[arg-type]
        return [port.name for port in answer.ports]

    assert await names("") == ["vnet0", "vnet1"]
    assert await names(GUEST.upper()) == ["vnet0"]
    assert await names("none") == []


async def test_a_host_without_open_vswitch(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="install and start openvswitch-switch"):
        await OvsPorts(f"unix:{tmp_path}/none.sock").read()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{tmp_path}/dead.sock")
    with pytest.raises(PreconditionError, match="Connection refused"):
        await OvsPorts(f"unix:{tmp_path}/dead.sock").read()


async def test_a_database_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ovs_ports, "READ_TIMEOUT_S", 0.3)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{tmp_path}/silent.sock")
        silent.listen(8)
        with pytest.raises(DeadlineError):
            await OvsPorts(f"unix:{tmp_path}/silent.sock").read()
