"""gRPC channels that notice a frozen peer within seconds."""

from collections.abc import Sequence

import grpc
import grpc.aio

# A peer under SIGSTOP keeps its TCP connection open: only HTTP/2 pings tell. The values are measured against etcd,
# which answers pings more often than every 5 s with GOAWAY too_many_pings, and pings without a call likewise.
# ping_timeout_ms is needed beside keepalive_timeout_ms: without it a frozen peer is noticed after 60 s.
CHANNEL_OPTIONS: Sequence[tuple[str, int | str]] = (
    ("grpc.keepalive_time_ms", 6000),
    ("grpc.keepalive_timeout_ms", 1500),
    ("grpc.http2.ping_timeout_ms", 1500),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", 64 << 20),
    # An operator's shell often names a proxy for the web; it leads nowhere near the management network.
    ("grpc.enable_http_proxy", 0),
)
ROUND_ROBIN = ("grpc.service_config", '{"loadBalancingConfig":[{"round_robin":{}}]}')


def open_channel(address: str) -> grpc.aio.Channel:
    """Opens a channel to one address: "host:port" or "unix:/path". Connects lazily; close it when done."""
    return grpc.aio.insecure_channel(address, options=list(CHANNEL_OPTIONS))


def open_balanced_channel(addresses: Sequence[str]) -> grpc.aio.Channel:
    """Opens one channel over several "ipv4:port" addresses of one service; a dead one is left out by itself."""
    target = f"ipv4:{','.join(addresses)}"
    return grpc.aio.insecure_channel(target, options=[*CHANNEL_OPTIONS, ROUND_ROBIN])
