"""`handoff-controller`: one replica. Serves reads at once; leads when it is elected."""

import asyncio
import sys
from pathlib import Path

import click
import structlog

from handoff.controller.v1 import guests_pb2_grpc, hosts_pb2_grpc, migrations_pb2_grpc, rollouts_pb2_grpc
from handoff_common.config import load_settings
from handoff_common.errors import HandoffError
from handoff_common.logs import configure_logs
from handoff_common.server import Server, notify_systemd, until_stopped
from handoff_controller.agents import Agents
from handoff_controller.conductor import Conductor
from handoff_controller.etcd.client import EtcdClient
from handoff_controller.etcd.election import Election, Leadership
from handoff_controller.rollout_service import RolloutsService
from handoff_controller.services import GuestsService, HostsService, LeaderLink, MigrationsService
from handoff_controller.settings import ControllerSettings
from handoff_controller.store import Reader

log = structlog.get_logger()

SERVICES = (
    "handoff.controller.v1.MigrationsService",
    "handoff.controller.v1.RolloutsService",
    "handoff.controller.v1.GuestsService",
    "handoff.controller.v1.HostsService",
)


async def serve(settings: ControllerSettings) -> None:
    """Runs one replica until SIGTERM or SIGINT."""
    async with EtcdClient(settings.etcd.endpoints) as client:
        agents = Agents(settings.hosts)
        reader = Reader(client)
        link = LeaderLink(client, settings.name)
        server = Server(SERVICES)
        migrations_pb2_grpc.add_MigrationsServiceServicer_to_server(MigrationsService(reader, link), server.grpc_server)
        rollouts_pb2_grpc.add_RolloutsServiceServicer_to_server(RolloutsService(reader, link), server.grpc_server)
        guests_pb2_grpc.add_GuestsServiceServicer_to_server(GuestsService(reader), server.grpc_server)
        hosts_pb2_grpc.add_HostsServiceServicer_to_server(
            HostsService(reader, dict(settings.hosts), agents), server.grpc_server
        )

        async def lead(leadership: Leadership) -> None:
            link.conductor = Conductor(client, leadership, agents, settings)
            try:
                await link.conductor.run()
            finally:
                link.conductor = None

        election = Election(client, settings.name, settings.advertise, lease_ttl_s=settings.etcd.lease_ttl_s)
        await server.start(settings.listen)
        candidate = asyncio.create_task(election.run(lead), name="election")
        stopped = asyncio.create_task(until_stopped())
        notify_systemd("READY=1")
        log.info("serving", name=settings.name, listen=settings.listen)
        try:
            await asyncio.wait({candidate, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if candidate.done():
                candidate.result()
        finally:
            notify_systemd("STOPPING=1")
            for task in (candidate, stopped):
                task.cancel()
            await asyncio.wait({candidate, stopped})
            await server.stop()
            await link.close()
            await agents.close()


@click.command()
@click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("/etc/handoff/controller.toml"),
    show_default=True,
    help="Configuration file (TOML).",
)
def main(path: Path) -> None:
    """Coordinates the migrations of a fleet: one of several replicas, of which one leads."""
    try:
        settings = load_settings(path, ControllerSettings)
        configure_logs(settings.log_format, settings.log_level)
        asyncio.run(serve(settings))
    except HandoffError as error:
        sys.exit(f"handoff-controller: {error.message}")


if __name__ == "__main__":
    main()
