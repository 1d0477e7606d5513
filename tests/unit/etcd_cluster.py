"""Three real etcd members on loopback that can be killed, frozen and brought back."""

import asyncio
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_network
from pathlib import Path

from handoff_common.errors import HandoffError
from handoff_controller.etcd.client import EtcdClient

SIZE = 3
CLIENT_PORT, PEER_PORT = 2379, 2380
# Room for four addresses of every process: a pid has 22 bits.
LOOPBACK = ip_network("127.0.0.0/8")


class EtcdCluster:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Loopback addresses of this process alone: nobody else takes a port there, also not while its member is dead.
        addresses = [str(LOOPBACK[os.getpid() * 4 + member]) for member in range(SIZE)]
        self.endpoints = tuple(f"{address}:{CLIENT_PORT}" for address in addresses)
        self._peers = tuple(f"http://{address}:{PEER_PORT}" for address in addresses)
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * SIZE
        self._frozen: set[int] = set()
        self._harmed = True

    def start(self, member: int) -> None:
        client_url = f"http://{self.endpoints[member]}"
        everybody = ",".join(f"m{number}={peer}" for number, peer in enumerate(self._peers))
        with (self._folder / f"m{member}.log").open("ab") as log:
            self._processes[member] = subprocess.Popen(
                [
                    # No member outlives the tests, however they end.
                    *("setpriv", "--pdeathsig", "KILL", "/usr/bin/etcd"),
                    *("--name", f"m{member}", "--data-dir", self._folder / f"m{member}"),
                    *("--listen-client-urls", client_url, "--advertise-client-urls", client_url),
                    *("--listen-peer-urls", self._peers[member]),
                    *("--initial-advertise-peer-urls", self._peers[member]),
                    *("--initial-cluster", everybody, "--logger", "zap", "--log-level", "warn"),
                ],
                stdout=log,
                stderr=log,
                env={"PATH": os.environ["PATH"]},
            )

    def kill(self, member: int) -> None:
        process = self._processes[member]
        assert process is not None
        self._harmed = True
        process.kill()
        process.wait()
        self._processes[member] = None

    def freeze(self, member: int) -> None:
        self._harmed = True
        self._signal(member, signal.SIGSTOP)
        self._frozen.add(member)

    def thaw(self, member: int) -> None:
        self._signal(member, signal.SIGCONT)
        self._frozen.discard(member)

    async def heal(self) -> None:
        """Brings every member back that was killed or frozen, and waits until each of them answers."""
        if not self._harmed:
            return
        for member in range(SIZE):
            if self._processes[member] is None:
                self.start(member)
            elif member in self._frozen:
                self.thaw(member)
        for endpoint in self.endpoints:
            async with EtcdClient([endpoint]) as client:
                await until(lambda client=client: _answers(client), 20)  # type: ignore[misc]
        self._harmed = False

    def stop(self) -> None:
        for member, process in enumerate(self._processes):
            if process is not None:
                self.kill(member)

    def ctl(self, *arguments: str, members: Sequence[int] = range(SIZE)) -> str:
        endpoints = ",".join(self.endpoints[member] for member in members)
        command = ("etcdctl", f"--endpoints={endpoints}", *arguments)
        environment = {"PATH": os.environ["PATH"], "ETCDCTL_API": "3"}
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout

    def leader(self) -> int:
        members = json.loads(self.ctl("endpoint", "status", "-w", "json"))
        (number,) = (
            self.endpoints.index(member["Endpoint"])
            for member in members
            if member["Status"]["header"]["member_id"] == member["Status"]["leader"]
        )
        return number

    def watched(self) -> int | None:
        """The member that the cluster's only watch is on."""
        watched = [number for number in range(SIZE) if self._processes[number] and _watchers(self.endpoints[number])]
        assert len(watched) <= 1
        return watched[0] if watched else None

    def _signal(self, member: int, number: signal.Signals) -> None:
        process = self._processes[member]
        assert process is not None
        process.send_signal(number)


async def until(condition: Callable[[], bool | Awaitable[bool]], deadline_s: float, every_s: float = 0.05) -> None:
    """Polls `condition` until it holds; fails the test at the deadline."""
    end = time.monotonic() + deadline_s
    while True:
        holds = condition()
        if not isinstance(holds, bool):
            holds = await holds
        if holds:
            return
        assert time.monotonic() < end, f"did not come true within {deadline_s} s"
        await asyncio.sleep(every_s)


async def _answers(client: EtcdClient) -> bool:
    try:
        await client.get("/health", deadline_s=1.0)
    except HandoffError:
        return False
    return True


def _watchers(endpoint: str) -> int:
    with urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=5) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith("etcd_debugging_mvcc_watcher_total "):
                return int(float(line.split()[1]))
    raise AssertionError(f"{endpoint} does not tell its watchers")
