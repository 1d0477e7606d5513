"""Does a fault, and undoes it."""

import asyncio
import time
from collections.abc import Callable
from typing import Final, assert_never

from handoff_lab.daemon import Daemon
from handoff_lab.fabric import Fabric
from soak.faults import FREEZE_S, Blow, Cut, DiskFull, Fault, KilledTogether, Lasting, Link, Struck, Victim
from soak.scene import Cast, Scene, disk_of, freeze, kill, thaw

RESTART_AFTER_S: Final = 1.0
"""RestartSec of our units and libvirt's."""
FILLING: Final = "filling"

_RESTARTED: Final = {
    Victim.SOURCE_AGENT: "agent",
    Victim.DESTINATION_AGENT: "agent",
    Victim.SOURCE_LIBVIRTD: "libvirtd-a",
    Victim.DESTINATION_LIBVIRTD: "libvirtd-a",
}


class Injection:
    """One fault on one fleet. `strike` it; it passes by itself, or lasts until `heal`."""

    def __init__(self, scene: Scene, cast: Cast, fault: Fault, destination_qemu: int | None) -> None:
        """`destination_qemu`: None where there is none yet."""
        self._scene = scene
        self._cast = cast
        self._fault = fault
        self._destination_qemu = destination_qemu
        self._undo: Callable[[], None] = lambda: None
        self._passing: asyncio.Task[None] | None = None
        self.struck: frozenset[int] = frozenset()
        """Processes that are frozen, or dead."""
        self.at_s = 0.0
        self.at_ns = 0

    async def strike(self) -> None:
        """Does it. A fault that passes is undone by a task of its own."""
        strike, lasts_s = self._plan()
        self.at_s, self.at_ns = time.time(), time.monotonic_ns()
        if isinstance(self._fault, Struck | KilledTogether):
            strike()
        else:
            await asyncio.to_thread(strike)
        if lasts_s is not None:
            self._passing = asyncio.create_task(self._pass(lasts_s))

    async def heal(self) -> None:
        """Undoes it, or waits until it has passed by itself."""
        if self._passing is not None:
            await self._passing
        else:
            await asyncio.to_thread(self._undo)

    async def _pass(self, lasts_s: float) -> None:
        await asyncio.sleep(lasts_s)
        await asyncio.to_thread(self._undo)

    def _plan(self) -> tuple[Callable[[], None], float | None]:
        """What to do, and after how many seconds it passes; None for what lasts until it is healed."""
        match self._fault:
            case Struck(victim, blow):
                return self._struck(victim, blow)
            case KilledTogether(victims):
                pids = [self._pid(victim) for victim in victims]
                self.struck = frozenset(pids)
                return lambda: kill(pids), None
            case Cut(link, lasting):
                self._undo = lambda: self._set_link(link, up=True)
                return lambda: self._set_link(link, up=False), FREEZE_S if lasting is Lasting.A_WHILE else None
            case DiskFull():
                host = self._scene.fleet.host(self._cast.destination)
                path = disk_of(host) / FILLING
                self._undo = lambda: _run(host.node.run, ["rm", "-f", str(path)])
                # The last blocks too: cat writes on where dd's large ones do not fit.
                fill = f"dd if=/dev/zero of={path} bs=64k 2>/dev/null || cat /dev/zero >>{path} 2>/dev/null || true"
                return lambda: _run(host.node.run, ["sh", "-c", fill]), None
            case _:
                assert_never(self._fault)

    def _struck(self, victim: Victim, blow: Blow) -> tuple[Callable[[], None], float | None]:
        pid = self._pid(victim)
        self.struck = frozenset({pid})
        match blow:
            case Blow.FREEZE:
                self._undo = lambda: thaw([pid])
                return lambda: freeze([pid]), FREEZE_S
            case Blow.KILL:
                daemon = self._restarted(victim)
                if daemon is None:
                    return lambda: kill([pid]), None
                self._undo = daemon.start
                return lambda: kill([pid]), RESTART_AFTER_S
            case _:
                assert_never(blow)

    def _pid(self, victim: Victim) -> int:
        pid = self._destination_qemu if victim is Victim.DESTINATION_QEMU else self._cast.pids[victim]
        assert pid is not None, f"there is no {victim}"
        return pid

    def _restarted(self, victim: Victim) -> Daemon | None:
        if victim not in _RESTARTED:
            return None
        is_source = victim in (Victim.SOURCE_AGENT, Victim.SOURCE_LIBVIRTD)
        host = self._cast.source if is_source else self._cast.destination
        return self._scene.fleet.daemon(host, _RESTARTED[victim])

    def _set_link(self, link: Link, *, up: bool) -> None:
        fabric: Fabric = self._scene.fleet.fabric
        match link:
            case Link.BETWEEN_HOSTS:
                fabric.keep_apart(self._cast.source, self._cast.destination, apart=not up)
            case Link.TO_SOURCE:
                self._scene.fleet.set_link(self._cast.source, up, management=True, overlay=False)
            case Link.TO_DESTINATION:
                self._scene.fleet.set_link(self._cast.destination, up, management=True, overlay=False)
            case _:
                assert_never(link)


def _run(run: Callable[[list[str]], object], command: list[str]) -> None:
    run(command)
