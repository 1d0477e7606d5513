"""handoff-agent: runs on each hypervisor, as root, and does what the leader orders."""

import asyncio
import gc
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import click
import structlog

from handoff.agent.v1 import disk_pb2_grpc, flow_pb2_grpc, host_pb2_grpc, qemu_pb2_grpc
from handoff_agent.arrival import Arrivals
from handoff_agent.companions import AllCompanions
from handoff_agent.departure import Departures
from handoff_agent.destination import Listener
from handoff_agent.disk_service import DiskService
from handoff_agent.disks.companions import DiskCompanions
from handoff_agent.disks.plans import DiskPlans
from handoff_agent.disks.settings import StorageSettings
from handoff_agent.disks.storage_daemon import Address
from handoff_agent.emulators import CAPABILITIES_TIMEOUT_S, DomainCapabilities, Emulators
from handoff_agent.flow_service import FlowService
from handoff_agent.handoff_changes import HandoffChanges
from handoff_agent.handoffs import Handoffs
from handoff_agent.host_service import HostService
from handoff_agent.inventory import Inventory
from handoff_agent.ledger import Ledger, TermGuard
from handoff_agent.local_sockets import LocalSockets
from handoff_agent.network.companion import NetworkCompanions
from handoff_agent.network.knowledge import Store
from handoff_agent.network.network import Network
from handoff_agent.network.newcomers import definition_of
from handoff_agent.ovs_ports import OvsPorts
from handoff_agent.qemu_service import QemuService
from handoff_agent.settings import AgentSettings
from handoff_agent.slots import Hypervisor, Slot
from handoff_agent.survey import Survey
from handoff_common.config import load_settings
from handoff_common.errors import HandoffError
from handoff_common.logs import configure_logs
from handoff_common.server import Server, notify_systemd, until_stopped

log = structlog.get_logger()

SERVICES: Final = tuple(f"handoff.agent.v1.{name}Service" for name in ("Host", "Qemu", "Disk", "Flow"))
CONNECT_TIMEOUT_S: Final = 10.0
STORAGE_THREADS: Final = 4


@click.command()
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    default=Path("/etc/handoff/agent.toml"),
    show_default=True,
    help="The agent's configuration file.",
)
def main(config_path: Path) -> None:
    """Runs the agent of this hypervisor until SIGTERM. Guests and transfers go on without it."""
    try:
        settings = load_settings(config_path, AgentSettings)
        configure_logs(settings.log_format, settings.log_level)
        asyncio.run(serve(settings))
    except HandoffError as error:
        raise click.ClickException(error.message) from None


async def serve(settings: AgentSettings) -> None:
    """Serves until SIGTERM or SIGINT."""
    slots = [Slot(name, slot.uri) for name, slot in settings.slots.items()]
    async with AsyncExitStack() as stack:
        hypervisor = await stack.enter_async_context(Hypervisor(slots).running())
        await asyncio.gather(*(slot.wait_connected(CONNECT_TIMEOUT_S) for slot in slots))
        emulators = Emulators(settings.emulators, _capabilities_of(slots[0]))
        await emulators.probe()
        inventory = Inventory(hypervisor, emulators, settings.shared_paths)
        stack.push_async_callback(inventory.close)
        survey = Survey(settings, hypervisor, emulators, inventory)
        stack.callback(survey.close)
        changes = HandoffChanges()
        storage = ThreadPoolExecutor(STORAGE_THREADS, "storage")
        stack.callback(storage.shutdown, wait=False, cancel_futures=True)
        ports = OvsPorts(settings.ovs_database)
        stack.callback(ports.close)
        network = await stack.enter_async_context(_network(settings, ports, hypervisor)) if settings.network else None
        handoffs = Handoffs(
            hypervisor,
            Departures(hypervisor, inventory, survey, settings.shared_paths),
            Arrivals(
                survey,
                emulators,
                settings.graphics_address or settings.migration_address,
                DiskPlans(
                    settings.name,
                    settings.host_type,
                    settings.place_of_disks(),
                    storage,
                    tls=settings.disk_tls is not None,
                ),
            ),
            Listener(settings.migration_address, *settings.migration_ports),
            LocalSockets(settings.runtime_dir, settings.qemu_user),
            Ledger(settings.state_dir),
            TermGuard(settings.state_dir),
            changes,
            AllCompanions(
                *([NetworkCompanions(network)] if network else []),
                DiskCompanions(_storage_settings(settings), storage, slots),
            ),
        )
        await handoffs.open()
        stack.push_async_callback(handoffs.close)
        if network is not None:
            await network.only_these_leave(handoffs.leaving())
        qemu = QemuService(inventory, handoffs)
        host = HostService(settings, hypervisor, emulators, inventory, changes, lambda: handoffs.term)
        server = Server(SERVICES)
        qemu_pb2_grpc.add_QemuServiceServicer_to_server(qemu, server.grpc_server)
        host_pb2_grpc.add_HostServiceServicer_to_server(host, server.grpc_server)
        disk_pb2_grpc.add_DiskServiceServicer_to_server(DiskService(hypervisor, inventory), server.grpc_server)
        flow_pb2_grpc.add_FlowServiceServicer_to_server(FlowService(ports, network, handoffs), server.grpc_server)
        stack.push_async_callback(qemu.finish)
        await server.start(settings.listen)
        stack.push_async_callback(server.stop)
        # A collection over everything imported takes some 30 ms, which a paused guest would wait for.
        gc.collect()
        gc.freeze()
        notify_systemd("READY=1")
        log.info("agent serves", host=settings.name, listen=list(settings.listen))
        await until_stopped()
        notify_systemd("STOPPING=1")
        log.info("agent stops")


def _storage_settings(settings: AgentSettings) -> StorageSettings:
    return StorageSettings(
        folder=settings.runtime_dir / "storage",
        address=Address(settings.migration_address, *settings.migration_ports),
        owner=settings.qemu_user,
        tls_credentials=str(settings.disk_tls or ""),
    )


@asynccontextmanager
async def _network(settings: AgentSettings, ports: OvsPorts, hypervisor: Hypervisor) -> AsyncIterator[Network]:
    """The tenants' networks, kept in the bridge for as long as the context lasts; the flows stay."""
    assert settings.network is not None
    network = Network(
        settings.network,
        settings.ovs_database,
        ports,
        Store(settings.state_dir),
        partial(definition_of, hypervisor),
    )
    await network.open()
    keeper = asyncio.create_task(network.run(), name="network")
    try:
        yield network
    finally:
        keeper.cancel()
        await asyncio.wait({keeper})
        await network.close()


def _capabilities_of(slot: Slot) -> DomainCapabilities:
    async def ask(emulator: str, virtualisation: str) -> str:
        return await slot.call(
            lambda connection: connection.getDomainCapabilities(emulator, None, None, virtualisation),
            CAPABILITIES_TIMEOUT_S,
        )

    return ask


if __name__ == "__main__":
    main()
