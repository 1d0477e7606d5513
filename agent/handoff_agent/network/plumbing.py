"""The few things about ports that OpenFlow 1.4 can't say; none of them is done while a guest is paused."""

import asyncio
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from handoff_common.errors import DeadlineError, HandoffError

COMMAND_TIMEOUT_S: Final = 5.0
TAP_QUEUE_PACKETS: Final = 10_000
"""What a tap keeps for a guest that does not run yet: 10 s of a packet each millisecond, at most 15 MB."""


async def make_tunnel_port(database: str, bridge: str, name: str, address: IPv4Address) -> None:
    """Sees to one VXLAN port for all tenants and all other hosts. Raises HandoffError as `run` does."""
    add = ("--may-exist", "add-port", bridge, name)
    options = ("options:remote_ip=flow", "options:key=flow", f"options:local_ip={address}")
    timeout = f"--timeout={COMMAND_TIMEOUT_S:g}"
    await run("ovs-vsctl", f"--db={database}", timeout, *add, "--", "set", "Interface", name, "type=vxlan", *options)


async def keep_from_flooding(management: Path, port: str) -> None:
    """What the site's flows flood, or send by learnt addresses, does not reach this port."""
    await run("ovs-ofctl", "mod-port", f"unix:{management}", port, "no-flood")


def lengthen_queue(tap: str) -> None:
    """Lets a tap keep more than the kernel's 500 or 1000 packets. Raises OSError."""
    Path("/sys/class/net", tap, "tx_queue_len").write_text(f"{TAP_QUEUE_PACKETS}\n")


def empty_queue(tap: str) -> None:
    """Throws away what waits in a tap: the kernel drops what a shorter queue does not hold. Raises OSError."""
    length = Path("/sys/class/net", tap, "tx_queue_len")
    usual = length.read_text()
    length.write_text("0\n")
    length.write_text(usual)


def frames_read(tap: str) -> int:
    """How many frames QEMU has read from a tap: the kernel counts them only then. Raises OSError."""
    return int(Path("/sys/class/net", tap, "statistics/tx_packets").read_text())


async def run(*command: str) -> None:
    """Runs a program. Raises HandoffError with what it says, and DeadlineError."""
    pipe, none = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    try:
        process = await asyncio.create_subprocess_exec(*command, stdin=none, stdout=none, stderr=pipe)
    except OSError as error:
        raise HandoffError(f"{command[0]}: {error.strerror or error}") from error
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT_S + 1):
            _, errors = await process.communicate()
    except TimeoutError:
        raise DeadlineError(f"{command[0]} did not end within {COMMAND_TIMEOUT_S + 1:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise HandoffError(f"{command[0]}: {errors.decode(errors='replace').strip()}")
