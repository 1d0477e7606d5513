"""One way to serve gRPC: errors become statuses, and every server has health, reflection and channelz."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, TypeVar, cast

import grpc
import grpc.aio
import structlog
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from handoff_common.errors import KIND_TRAILER, HandoffError, UnavailableError

log = structlog.get_logger()

Request = TypeVar("Request")
Response = TypeVar("Response")
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

# A server that forbids its clients' pings would answer channel.py's keep-alive with GOAWAY.
SERVER_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.http2.min_ping_interval_without_data_ms", 3000),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.so_reuseport", 0),
)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Answers a HandoffError with its status, and anything unforeseen with INTERNAL and a logged traceback."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Request, Response] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Request, Response] | None:
        """Wraps the handlers of unary and server-streaming calls; the others pass as they are."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        method = handler_call_details.method
        if handler.response_streaming:
            stream = cast(Callable[[Request, Context], AsyncIterator[Response]], handler.unary_stream)
            return grpc.unary_stream_rpc_method_handler(
                _guarded_stream(method, stream), handler.request_deserializer, handler.response_serializer
            )
        unary = cast(Callable[[Request, Context], Awaitable[Response]], handler.unary_unary)
        return grpc.unary_unary_rpc_method_handler(
            _guarded_unary(method, unary), handler.request_deserializer, handler.response_serializer
        )


def _guarded_unary(
    method: str, inner: Callable[[Request, Context], Awaitable[Response]]
) -> Callable[[Request, Context], Awaitable[Response]]:
    async def unary(request: Request, context: Context) -> Response:
        try:
            return await inner(request, context)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:  # noqa: BLE001 - the boundary of the process
            await _abort(method, context, error)

    return unary


def _guarded_stream(
    method: str, inner: Callable[[Request, Context], AsyncIterator[Response]]
) -> Callable[[Request, Context], AsyncIterator[Response]]:
    async def stream(request: Request, context: Context) -> AsyncIterator[Response]:
        try:
            async for response in inner(request, context):
                yield response
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:  # noqa: BLE001 - the boundary of the process
            await _abort(method, context, error)

    return stream


async def _abort(method: str, context: Context, error: Exception) -> NoReturn:
    if isinstance(error, HandoffError):
        await context.abort(error.code, error.message, ((KIND_TRAILER, type(error).__name__),))
    log.error("rpc failed", method=method, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")


class Server:
    """A grpc.aio server on several addresses, with health, reflection and channelz added.

    Register servicers on `grpc_server`, then `start`, and `stop` at the end. Health is SERVING from `start` on,
    for the whole server ("") and for each service.
    """

    def __init__(self, services: Sequence[str]) -> None:
        self.grpc_server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=list(SERVER_OPTIONS))
        self._services = services
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc_server)
        channelz.add_channelz_servicer(self.grpc_server)
        names = (*services, health.SERVICE_NAME, "grpc.channelz.v1.Channelz", reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.grpc_server)

    async def start(self, addresses: Sequence[str]) -> None:
        """Binds every address ("host:port" or "unix:/path") and serves.

        Raises UnavailableError when one can't be bound.
        """
        for address in addresses:
            path = address.removeprefix("unix:")
            if path != address:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                _remove_dead_socket(Path(path))
            try:
                self.grpc_server.add_insecure_port(address)
            except RuntimeError:
                raise UnavailableError(
                    f"can't listen on {address}: another process has it, or the address is not this host's"
                ) from None
        await self.grpc_server.start()
        for service in ("", *self._services):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float = 1.0) -> None:
        """Reports NOT_SERVING, lets running calls end for `grace_s` seconds, then closes."""
        await self._health.enter_graceful_shutdown()
        await self.grpc_server.stop(grace_s)


def _remove_dead_socket(path: Path) -> None:
    """Removes a socket that a killed server left behind: gRPC would refuse to bind it."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)


def notify_systemd(state: str) -> None:
    """Tells systemd our state ("READY=1", "STOPPING=1"), as sd_notify(3) does; nothing happens outside of systemd."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.connect(address.replace("@", "\0", 1))
        client.sendall(state.encode())


async def until_stopped() -> None:
    """Waits for SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    await stopped.wait()
