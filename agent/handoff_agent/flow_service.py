"""FlowService: the Open vSwitch ports of the host's guests."""

import grpc.aio

from handoff.agent.v1 import flow_pb2, flow_pb2_grpc
from handoff_agent.ovs_ports import OvsPorts


class FlowService(flow_pb2_grpc.FlowServiceServicer):
    """Serves ListPorts."""

    def __init__(self, ports: OvsPorts) -> None:
        self._ports = ports

    async def ListPorts(  # noqa: N802
        self,
        request: flow_pb2.ListPortsRequest,
        context: grpc.aio.ServicerContext[flow_pb2.ListPortsRequest, flow_pb2.ListPortsResponse],
    ) -> flow_pb2.ListPortsResponse:
        """The ports, by name. FAILED_PRECONDITION when the host has no Open vSwitch."""
        wanted = request.domain_uuid.lower()
        return flow_pb2.ListPortsResponse(
            ports=[
                flow_pb2.Port(
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
