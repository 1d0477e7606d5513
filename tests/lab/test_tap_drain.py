"""The moment before a guest is stopped, on a real switch and a real tap: nothing may be left in it by then."""

import asyncio
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Address
from pathlib import Path
from typing import cast

import pytest

from handoff_agent.network import plumbing
from handoff_agent.network.bridge import Bridge
from handoff_agent.network.connection import OpenFlowConnection
from handoff_agent.network.flow import Output
from handoff_agent.network.pipeline import NOBODYS_FRAME
from handoff_agent.network.taps import Taps
from handoff_agent.network.treatment import Key
from handoff_agent.ovs_ports import OvsPorts
from handoff_agent.settings import NetworkSettings
from handoff_lab.fleet import Fleet

pytestmark = pytest.mark.lab

HOST = "h1"
TAP = "drain0"
KEY = Key(1001, "52:54:00:40:00:c7")
WAITING = 120

GUESTS_FRAME = NOBODYS_FRAME[:-1] + b"\x01"

# Reads a tap as QEMU does: at most fifty frames at a time. What else QEMU has to do takes 5 ms here. Says how many of
# the guest's are left when it is told to stop.
QEMU = """
import fcntl, os, select, struct, sys
tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", sys.argv[1].encode(), 0x1002))

def read(most):
    frames = []
    while len(frames) < most:
        try:
            frames.append(os.read(tap, 2000))
        except BlockingIOError:
            break
    return frames

print("plugged", flush=True)
sys.stdin.readline()
while not select.select([sys.stdin], [], [], 0.005)[0]:
    read(50)
print(read(1_000_000).count(bytes.fromhex(sys.argv[2])), flush=True)
"""


class Switch:
    """A bridge's connection, and the number of its one port."""

    def __init__(self, connection: OpenFlowConnection, ofport: int) -> None:
        self.numbers = {TAP: ofport}
        self.send = connection.send


class SlowQemu:
    """The program above."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def hears(self) -> str:
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode().strip()

    def told(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")

    async def ends(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


@asynccontextmanager
async def plugged(fleet: Fleet) -> AsyncIterator[tuple[SlowQemu, OpenFlowConnection, int]]:
    """The tap on the host's bridge, its reader, the bridge, and the port's number."""
    node = fleet.node(HOST)
    command = node.command([sys.executable, "-c", QEMU, TAP, GUESTS_FRAME.hex()])
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    qemu = SlowQemu(process)
    bridge = fleet.lab.node(HOST) / "run/openvswitch/br-int.mgmt"
    try:
        assert await qemu.hears() == "plugged"
        await asyncio.to_thread(node.run, ["ip", "link", "set", TAP, "up"])
        await asyncio.to_thread(node.run, ["ovs-vsctl", "add-port", "br-int", TAP])
        await asyncio.to_thread(node.run, ["ovs-ofctl", "mod-port", "br-int", TAP, "no-flood"])
        ofport = int((await asyncio.to_thread(node.run, ["ovs-vsctl", "get", "Interface", TAP, "ofport"])).stdout)
        connection = await OpenFlowConnection.open(bridge, lambda _present, _port: None)
        reading = asyncio.create_task(connection.run())
        try:
            yield qemu, connection, ofport
        finally:
            reading.cancel()
            await asyncio.wait({reading})
    finally:
        await asyncio.to_thread(node.run, ["ovs-vsctl", "--if-exists", "del-port", TAP])
        await qemu.ends()


async def test_a_guest_is_not_stopped_before_its_tap_is_empty(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy QEMU has more in the tap than it reads at a time: what it has not read when it stops is lost."""
    system = Path(f"/proc/{fleet.node(HOST).require_pid()}/root/sys/class/net")
    monkeypatch.setattr(plumbing, "frames_read", lambda tap: int((system / tap / "statistics/tx_packets").read_text()))
    async with plugged(fleet) as (qemu, connection, ofport):
        settings = NetworkSettings(tunnel_address=IPv4Address("10.21.0.1"))
        taps = Taps(settings, "", cast(OvsPorts, None), cast(Bridge, Switch(connection, ofport)))
        taps.bind({f"{KEY.tunnel}/{KEY.mac}": TAP})
        for _ in range(WAITING):
            connection.send((Output(ofport),), GUESTS_FRAME)
        qemu.told()
        is_empty = await taps.drain(KEY)
        qemu.told()
        assert (is_empty, await qemu.hears()) == (True, "0")
