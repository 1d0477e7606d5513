"""Who may open a volume, and when that changes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
from etcd_cluster import until
from instant_agents import InstantAgent, InstantAgents
from leading import Lead
from pydantic import ValidationError
from records import domain

from handoff.agent.v1.types_pb2 import Disk, DiskPlacement
from handoff.controller.v1.migrations_pb2 import CreateMigrationRequest, Migration
from handoff.storage.v1 import access_pb2 as pb
from handoff.storage.v1 import access_pb2_grpc
from handoff_common.errors import DeadlineError, NotFoundError, PreconditionError, UnavailableError
from handoff_common.server import Context, Server
from handoff_controller import volume_steps
from handoff_controller.agents import Agents
from handoff_controller.conductor import Conductor
from handoff_controller.etcd.client import EtcdClient
from handoff_controller.machine import FINAL, State, state_of
from handoff_controller.settings import ControllerSettings, EtcdSettings, VolumeSettings
from handoff_controller.store import Reader
from handoff_controller.volumes import Volumes, check_unchanged, network_volumes

WEB = pb.Volume(protocol="nbd", name="web", servers=["10.50.0.100:10809"])
NETWORK = DiskPlacement.DISK_PLACEMENT_NETWORK


def script(path: Path, body: str) -> tuple[str, ...]:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return (str(path), "--site")


def test_the_volumes_of_a_guest() -> None:
    disks = [
        Disk(target="vda", source="nbd:web", placement=NETWORK, servers=["s:1"]),
        Disk(target="vdb", source="/srv/shared/b", placement=DiskPlacement.DISK_PLACEMENT_SHARED),
        Disk(target="vdc", source="iscsi:iqn.2026-01.example:a/1", placement=NETWORK),
        Disk(target="vdd", source="nbd:web", placement=NETWORK, servers=["s:1"]),
    ]

    assert network_volumes(disks) == [
        pb.Volume(protocol="nbd", name="web", servers=["s:1"]),
        pb.Volume(protocol="iscsi", name="iqn.2026-01.example:a/1"),
    ]


def test_a_volume_that_came_since_the_plan() -> None:
    check_unchanged("g", [WEB], [WEB])
    with pytest.raises(PreconditionError, match="volumes of g have changed since it was planned: none; now nbd:web"):
        check_unchanged("g", [], [WEB])


@pytest.mark.parametrize("given", [{}, {"service": "s:1", "command": ("x",)}])
def test_a_provider_is_a_service_or_a_command(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="either a service or a command"):
        VolumeSettings.model_validate(given)


async def test_the_first_that_matches_is_asked(tmp_path: Path) -> None:
    log = tmp_path / "log"
    tell = 'echo "$(basename $0) $* $HANDOFF_VOLUME_SERVERS $HANDOFF_VOLUME_REVISION" >>' + str(log)
    volumes = Volumes(
        [
            VolumeSettings(protocol="rbd", name="fast/*", command=script(tmp_path / "fast", tell)),
            VolumeSettings(protocol="rbd", command=script(tmp_path / "slow", tell)),
        ]
    )

    await volumes.grant(pb.Volume(protocol="rbd", name="fast/a", servers=["m1:6789", "m2:"]), "h2", 7)
    await volumes.revoke(pb.Volume(protocol="rbd", name="slow/a"), "h1", 8)
    await volumes.grant(WEB, "h2", 9)

    assert log.read_text().splitlines() == [
        "fast --site grant rbd:fast/a h2 m1:6789 m2: 7",
        "slow --site revoke rbd:slow/a h1  8",
    ]


async def test_a_command_that_does_not_do_it(tmp_path: Path) -> None:
    def provided(body: str, timeout_s: float = 10) -> Volumes:
        return Volumes([VolumeSettings(command=script(tmp_path / "access", body), timeout_s=timeout_s)])

    with pytest.raises(UnavailableError, match=r"nbd:web can't be given to h2: .* failed with status 3: no such array"):
        await provided("echo no such array; exit 3").grant(WEB, "h2", 1)
    with pytest.raises(DeadlineError, match=r"nbd:web can't be taken from h1: .* did not end within 0.2 s"):
        await provided("exec sleep 60", timeout_s=0.2).revoke(WEB, "h1", 1)
    with pytest.raises(UnavailableError, match="can't be run: No such file"):
        await Volumes([VolumeSettings(command=("/nowhere/access",))]).grant(WEB, "h2", 1)


class Array(access_pb2_grpc.VolumeAccessServiceServicer):
    """A storage system that knows one volume."""

    def __init__(self) -> None:
        self.hosts: set[str] = {"h1"}
        self.revisions: dict[str, int] = {}

    async def GrantAccess(self, request: pb.GrantAccessRequest, context: Context) -> pb.GrantAccessResponse:  # noqa: N802
        if request.volume != WEB:
            raise NotFoundError(f"no volume {request.volume.name}")
        self.hosts.add(request.host)
        self.revisions[request.host] = request.revision
        return pb.GrantAccessResponse()

    async def RevokeAccess(self, request: pb.RevokeAccessRequest, context: Context) -> pb.RevokeAccessResponse:  # noqa: N802
        if request.revision < self.revisions.get(request.host, 0):
            raise PreconditionError("too late")
        self.hosts.discard(request.host)
        return pb.RevokeAccessResponse()


async def test_a_storage_system_with_the_service(tmp_path: Path) -> None:
    array, server, address = Array(), Server(("handoff.storage.v1.VolumeAccessService",)), f"unix:{tmp_path}/s"
    access_pb2_grpc.add_VolumeAccessServiceServicer_to_server(array, server.grpc_server)
    volumes = Volumes([VolumeSettings(protocol="nbd", service=address, timeout_s=2)])
    try:
        with pytest.raises(UnavailableError, match="nbd:web can't be given to h2: storage at unix"):
            await volumes.grant(WEB, "h2", 1)
        await server.start([address])
        async with asyncio.timeout(10):
            while "h2" not in array.hosts:
                try:
                    await volumes.grant(WEB, "h2", 3)
                except UnavailableError:  # the channel waits a moment before it tries again
                    await asyncio.sleep(0.1)
        await volumes.revoke(WEB, "h1", 4)
        with pytest.raises(PreconditionError, match=r"nbd:web can't be taken from h2: .*too late"):
            await volumes.revoke(WEB, "h2", 2)
        assert array.hosts == {"h2"}
        with pytest.raises(NotFoundError, match="nbd:other can't be given to h2: no volume other"):
            await volumes.grant(pb.Volume(protocol="nbd", name="other"), "h2", 5)
    finally:
        await volumes.close()
        await server.stop()


class Site:
    """Two hosts, a guest with one volume on the first, and a command that keeps the access list."""

    def __init__(self, client: EtcdClient, tmp_path: Path) -> None:
        guest = domain("uuid-web", "web")
        guest.disks.add(target="vda", source="nbd:web", placement=NETWORK, servers=WEB.servers)
        self.h1, self.h2 = InstantAgent("h1", [guest]), InstantAgent("h2")
        self.reader = Reader(client)
        self.log = tmp_path / "log"
        self.command = script(tmp_path / "access", f'shift; echo "$*" >>{self.log}; [ ! -e {tmp_path}/broken ]')
        self.broken = tmp_path / "broken"
        self._client = client
        self._agents = InstantAgents([self.h1, self.h2])

    @asynccontextmanager
    async def led(self, lead: Lead) -> AsyncIterator[Conductor]:
        settings = ControllerSettings(
            name="c",
            advertise="127.0.0.1:1",
            etcd=EtcdSettings(endpoints=("127.0.0.1:1",)),
            hosts={name: f"{name}:7701" for name in self._agents.names()},
            volumes=(VolumeSettings(command=self.command),),
        )
        conductor = Conductor(self._client, await lead(), cast(Agents, self._agents), settings)
        work = asyncio.create_task(conductor.run())
        try:
            yield conductor
        finally:
            work.cancel()
            await asyncio.wait({work})

    async def ends(self, migration_id: str) -> Migration:
        async def over() -> bool:
            return state_of(await self.reader.migration(migration_id)) in FINAL

        await until(over, 20)
        return await self.reader.migration(migration_id)

    @property
    def changes(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def site(client: EtcdClient, empty: None, tmp_path: Path) -> Site:
    return Site(client, tmp_path)


MOVE = CreateMigrationRequest(guest="web", destination_host="h2", request_id="m1")


async def test_a_move_takes_the_volume_along(site: Site, lead: Lead) -> None:
    async with site.led(lead) as conductor:
        await conductor.create(MOVE)
        await until(lambda: _called(site.h2, "prepare_destination"), 10)
        assert site.changes == ["grant nbd:web h2"]
        site.h1.may_copy.set()
        ended = await site.ends("m1")

    assert state_of(ended) is State.DONE
    assert list(ended.volumes) == [WEB]
    assert list(ended.warnings) == []
    assert site.changes == ["grant nbd:web h2", "revoke nbd:web h1"]


async def test_a_volume_that_another_guest_runs_on_stays_open_to_its_host(site: Site, lead: Lead) -> None:
    other = domain("uuid-other", "other")
    other.disks.add(target="vdb", source="nbd:web", placement=NETWORK, read_only=True)
    site.h1.start(other)
    site.h1.may_copy.set()
    async with site.led(lead) as conductor:
        await conductor.create(MOVE)
        ended = await site.ends("m1")

    assert state_of(ended) is State.DONE
    assert site.changes == ["grant nbd:web h2"]


async def test_an_abort_takes_it_back(site: Site, lead: Lead) -> None:
    async with site.led(lead) as conductor:
        await conductor.create(MOVE)
        await until(lambda: _called(site.h1, "start_transfer"), 10)
        await conductor.cancel("m1")
        ended = await site.ends("m1")

    assert state_of(ended) is State.ABORTED
    assert site.changes == ["grant nbd:web h2", "revoke nbd:web h2"]


async def test_without_the_grant_nothing_is_prepared(site: Site, lead: Lead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_steps, "GRANT_PATIENCE_S", 0.3)
    monkeypatch.setattr(volume_steps, "REVOKE_PATIENCE_S", 0.3)
    site.broken.touch()
    async with site.led(lead) as conductor:
        await conductor.create(MOVE)
        ended = await site.ends("m1")

    assert state_of(ended) is State.ABORTED
    assert "volume nbd:web can't be given to h2" in ended.error
    assert not [call for call, _ in site.h2.calls if call == "prepare_destination"]
    assert ["Take nbd:web from h2 by hand" in warning for warning in ended.warnings] == [True]


async def test_a_grant_that_stays_is_a_warning(site: Site, lead: Lead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_steps, "REVOKE_PATIENCE_S", 0.3)
    async with site.led(lead) as conductor:
        await conductor.create(MOVE)
        await until(lambda: _called(site.h1, "start_transfer"), 10)
        site.broken.touch()
        site.h1.may_copy.set()
        ended = await site.ends("m1")

    assert state_of(ended) is State.DONE
    assert ["Take nbd:web from h1 by hand" in warning for warning in ended.warnings] == [True]


async def _called(agent: InstantAgent, name: str) -> bool:
    return any(call == name for call, _ in agent.calls)
