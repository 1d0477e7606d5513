"""FlowService: the Open vSwitch ports of the host's guests, and the flows of its tenants."""

from dataclasses import replace
from ipaddress import IPv4Address
from typing import Protocol

import grpc.aio

from handoff.agent.v1 import flow_pb2 as pb
from handoff.agent.v1 import flow_pb2_grpc
from handoff.agent.v1 import types_pb2 as types
from handoff_agent.network.knowledge import Told
from handoff_agent.network.metadata import make_attachment
from handoff_agent.network.network import Network, PortNow
from handoff_agent.network.treatment import Attachment
from handoff_agent.ovs_ports import OvsPorts
from handoff_common.errors import InvalidArgumentError, PreconditionError


class Admission(Protocol):
    """Refuses the orders of replaced leaders."""

    async def admit(self, fence: types.Fence) -> None:
        """Raises StaleTermError for one."""


class FlowService(flow_pb2_grpc.FlowServiceServicer):
    """Serves ports, and the network where there is one to manage."""

    def __init__(self, ports: OvsPorts, network: Network | None, admission: Admission) -> None:
        self._ports = ports
        self._network = network
        self._admission = admission

    async def ListPorts(  # noqa: N802
        self,
        request: pb.ListPortsRequest,
        context: grpc.aio.ServicerContext[pb.ListPortsRequest, pb.ListPortsResponse],
    ) -> pb.ListPortsResponse:
        """The ports, by name. FAILED_PRECONDITION when the host has no Open vSwitch."""
        wanted = request.domain_uuid.lower()
        return pb.ListPortsResponse(
            ports=[
                pb.Port(
                    name=port.name,
                    bridge=port.bridge,
                    ofport=port.ofport,
                    mac=port.mac,
                    domain_uuid=port.domain_uuid,
                )
                for port in await self._ports.read()
                if wanted in ("", port.domain_uuid)
            ]
        )

    async def SetNetwork(  # noqa: N802
        self,
        request: pb.SetNetworkRequest,
        context: grpc.aio.ServicerContext[pb.SetNetworkRequest, pb.SetNetworkResponse],
    ) -> pb.SetNetworkResponse:
        """Keeps what was told and puts it into the switch."""
        await self._admission.admit(request.fence)
        network = self._managed()
        told = Told(request.fence.term, request.generation, tuple(map(_attachment, request.ports)))
        return pb.SetNetworkResponse(applied=await network.tell(told))

    async def GetNetwork(  # noqa: N802
        self,
        request: pb.GetNetworkRequest,
        context: grpc.aio.ServicerContext[pb.GetNetworkRequest, pb.GetNetworkResponse],
    ) -> pb.GetNetworkResponse:
        """The network as it is now."""
        network = self._managed()
        bridge = network.bridge
        return pb.GetNetworkResponse(
            bridge=network.settings.bridge,
            tunnel_address=str(network.settings.tunnel_address),
            connected=bridge.connected,
            applied=bridge.connected and not bridge.message,
            message=bridge.message,
            term=network.told.term,
            generation=network.told.generation,
            flows=bridge.flows,
            ports=map(_view, network.ports()),
        )

    def _managed(self) -> Network:
        if self._network is None:
            raise PreconditionError(
                "this agent manages no flows: its configuration has no [network]; set tunnel_address in it"
            )
        return self._network


def _attachment(port: pb.NetworkPort) -> Attachment:
    try:
        made = make_attachment(port.mac, str(port.tunnel), " ".join(port.ips), port.domain_uuid, port.name)
        for address in (port.tunnel_address, port.arriving_at):
            if address:
                IPv4Address(address)
    except ValueError as error:
        raise InvalidArgumentError(f"port of {port.name}: {error}") from None
    return replace(made, any_source=port.any_source, location=port.tunnel_address, arriving=port.arriving_at)


def _view(now: PortNow) -> pb.PortView:
    port = now.attachment
    if now.leaves:
        handoff = pb.PORT_HANDOFF_LEAVING
    else:
        handoff = pb.PORT_HANDOFF_COMING if now.comes else pb.PORT_HANDOFF_UNSPECIFIED
    return pb.PortView(
        port=pb.NetworkPort(
            mac=port.key.mac,
            tunnel=port.key.tunnel,
            ips=port.addresses,
            any_source=port.any_source,
            tunnel_address=port.location,
            arriving_at=port.arriving,
            domain_uuid=port.domain_uuid,
            name=port.name,
        ),
        interface=now.interface,
        ofport=now.ofport,
        handoff=handoff,
        frames_go_to=now.goes_to,
    )
