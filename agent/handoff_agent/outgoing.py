"""QEMU's side of sending a guest, over QMP. Mechanism only; when to do what is for source.py.

QEMU decides by itself to pause the guest when what is left fits threshold = bandwidth x downtime-limit, or is nothing:
on a fast link a few milliseconds after the first pass. The capability switchover-ack (QEMU 8.1 and later) keeps it from
that: it waits for a word of the destination, which never comes because the destination does not have the capability on,
or for the guest to be stopped. So the guest is paused when we say `stop`, and never before, even if the agent is dead.

Older releases are only slowed near the end of a pass, and may be faster than that.

The threshold must never be 0: QEMU (10.0) then doesn't look for dirty pages again after the first pass, and pauses the
guest with all of them still to send.

With cpr-transfer nothing is copied. `migrate` sends the descriptors of the memory at once, the guest runs on, and QEMU
waits for the new one to close that connection, which it does when it is told to listen (`migrate-incoming`). Only then
does QEMU pause the guest, by itself, and send the state of its devices.
"""

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Final

from handoff_agent.local_sockets import cpr_socket, main_socket
from handoff_agent.monitor import Json, MigrationInfo, Monitor, QmpError

UNLIMITED_BYTES_PER_S: Final = 1 << 50
# QEMU sends one page in each of its windows of 100 ms at this rate.
HOLDING_BYTES_PER_S: Final = 10
COPYING_DOWNTIME_MS: Final = 1
# Together with COPYING_DOWNTIME_MS a threshold of one byte (QEMU 8.2 and later).
COPYING_SWITCHOVER_BYTES_PER_S: Final = 1000

# Between two QEMUs of one host; the destination must have the same.
MULTIFD_CAPABILITY: Final = {"multifd": True}
# Two would be faster, but when both break while QEMU (10.0) waits for them at the end of a pass, the first that sees it
# lets the other go without a word to the one who waits, for ever and with QEMU's global lock (docs/upgrade.md).
MULTIFD_PARAMETERS: Final[dict[str, Json]] = {"multifd-channels": 1}

# After it has said that a migration ended, QEMU still has to let go of its connections.
CLEAN_UP_S: Final = 5.0
CLEAN_UP_POLL_S: Final = 0.01

_FD_NAME: Final = "handoff"
_CAPABILITIES: Final = {
    "return-path": True,
    "pause-before-switchover": True,
    "auto-converge": True,
    "events": True,
}
_GATE: Final = "switchover-ack"
_MAX_THROTTLE: Final = 99
_THROTTLE: Final[dict[str, Json]] = {
    "cpu-throttle-initial": 80,
    "cpu-throttle-increment": 10,
    "max-cpu-throttle": _MAX_THROTTLE,
}
# QEMU's defaults.
_PARAMETERS_AFTERWARDS: Final[dict[str, Json]] = {
    "cpu-throttle-initial": 20,
    "cpu-throttle-increment": 10,
    "max-cpu-throttle": _MAX_THROTTLE,
    "max-bandwidth": 128 << 20,
    "downtime-limit": 300,
}
_PASS_ON_CAPABILITIES: Final = {"return-path": True, "events": True}
_MODE: Final = "mode"
_SWITCHOVER_BANDWIDTH: Final = "avail-switchover-bandwidth"


class OutgoingMigration:
    """The migration that one QEMU sends. All methods raise as Monitor.execute does."""

    def __init__(self, monitor: Monitor, bandwidth_bytes_per_s: int) -> None:
        """0 bytes per second: as fast as it goes."""
        self._monitor = monitor
        self._bandwidth = bandwidth_bytes_per_s or UNLIMITED_BYTES_PER_S
        self._has_switchover_bandwidth: bool | None = None
        self._gated: bool | None = None

    async def begin(self, fd: int) -> None:
        """Starts to send over the connected socket `fd`, of which QEMU gets a copy."""
        await self._prepare({})
        await self._monitor.execute_with_fd("getfd", {"fdname": _FD_NAME}, fd)
        await self._monitor.execute("migrate", {"uri": f"fd:{_FD_NAME}"})

    async def begin_multifd(self, path: str) -> None:
        """Starts to send to the Unix socket at `path`, over connections that QEMU makes."""
        await self._prepare(MULTIFD_CAPABILITY)
        await self._monitor.execute("migrate-set-parameters", MULTIFD_PARAMETERS)
        await self._monitor.execute("migrate", {"uri": f"unix:{path}"})

    async def _until_cleaned_up(self) -> None:
        """QEMU has let go of the last migration, if there was one. What keeps it for longer, `migrate` will tell."""
        deadline = time.monotonic() + CLEAN_UP_S
        while time.monotonic() < deadline:
            instances = await self._monitor.execute("query-yank")
            assert isinstance(instances, Sequence)
            if {"type": "migration"} not in instances:
                return
            await asyncio.sleep(CLEAN_UP_POLL_S)

    async def _prepare(self, more: Mapping[str, bool]) -> None:
        await self._until_cleaned_up()
        gate = {_GATE: True} if _GATE in await self._monitor.query_capabilities() else {}
        await self._monitor.set_capabilities({**_CAPABILITIES, **gate, **more})
        self._gated = bool(gate)
        await self._set(
            {"max-bandwidth": self._bandwidth, "downtime-limit": COPYING_DOWNTIME_MS} | _THROTTLE,
            switchover_bytes_per_s=COPYING_SWITCHOVER_BYTES_PER_S,
        )

    async def pass_on(self, folder: str) -> None:
        """Sends the descriptors of the memory to the QEMU that waits in `folder`; the guest runs on."""
        await self._until_cleaned_up()
        await self._monitor.set_capabilities(_PASS_ON_CAPABILITIES)
        await self._monitor.execute("migrate-set-parameters", {_MODE: "cpr-transfer"})
        channels: list[Json] = [_channel("main", main_socket(folder)), _channel("cpr", cpr_socket(folder))]
        await self._monitor.execute("migrate", {"channels": channels})

    async def hold(self, throttle_percent: int) -> None:
        """Slows the copy to one page in 100 ms, so that the present pass does not end.

        To QEMU that looks like a guest that dirties too fast: left alone it would slow the guest down, too, in the end
        to a hundredth. So the guest stays at `throttle_percent`, as it is now.
        """
        limit = min(max(throttle_percent, 1), _MAX_THROTTLE)
        held: dict[str, Json] = {"cpu-throttle-initial": limit, "max-cpu-throttle": limit}
        await self._monitor.execute(
            "migrate-set-parameters", {"max-bandwidth": HOLDING_BYTES_PER_S} | held, urgent=True
        )

    async def go_on(self) -> None:
        """Copies at full speed again."""
        await self._monitor.execute(
            "migrate-set-parameters", {"max-bandwidth": self._bandwidth} | _THROTTLE, urgent=True
        )

    async def allow_pause(self, downtime_ms: int, rate_bytes_per_s: float) -> None:
        """Copies at full speed, and lets QEMU pause the guest once what is left takes `downtime_ms` at that rate."""
        await self._set(
            {"max-bandwidth": self._bandwidth, "downtime-limit": downtime_ms},
            switchover_bytes_per_s=int(rate_bytes_per_s),
        )

    async def is_gated(self) -> bool:
        """QEMU does not pause the guest by itself; `stop` lets it send the rest."""
        if self._gated is None:
            self._gated = (await self._monitor.query_capabilities()).get(_GATE, False)
        return self._gated

    async def stop(self) -> None:
        """Pauses the guest; QEMU sends what is left and goes on to pre-switchover."""
        await self._monitor.execute("stop", urgent=True)

    async def switch(self) -> None:
        """Lets QEMU send the rest, after it has paused the guest."""
        await self._monitor.execute("migrate-continue", {"state": "pre-switchover"}, urgent=True)

    async def cancel(self, timeout_s: float) -> None:
        """Asks QEMU to give the migration up; a guest that QEMU has paused for it runs on. Returns before the end."""
        await self._monitor.execute("migrate_cancel", timeout_s=timeout_s, urgent=True)

    async def query(self) -> MigrationInfo:
        """Reads how far it is."""
        return await self._monitor.query_migrate(urgent=True)

    async def tidy(self) -> None:
        """Gives QEMU its defaults back, for whoever migrates this guest next."""
        # A `migrate` that never came left it with its connection; one that comes late is refused without it.
        with contextlib.suppress(QmpError):
            await self._monitor.execute("closefd", {"fdname": _FD_NAME})
        # libvirt switches "events" on for its own use.
        on = await self._monitor.query_capabilities()
        ours = {*_CAPABILITIES, _GATE, *MULTIFD_CAPABILITY} - {"events"}
        await self._monitor.set_capabilities({name: False for name in ours if on.get(name)})
        await self._set(_PARAMETERS_AFTERWARDS, switchover_bytes_per_s=0)
        await set_mode(self._monitor, "normal")

    async def _set(self, parameters: dict[str, Json], *, switchover_bytes_per_s: int) -> None:
        if self._has_switchover_bandwidth is None:
            known = await self._monitor.execute("query-migrate-parameters")
            assert isinstance(known, dict)
            self._has_switchover_bandwidth = _SWITCHOVER_BANDWIDTH in known
        if self._has_switchover_bandwidth:
            parameters = parameters | {_SWITCHOVER_BANDWIDTH: switchover_bytes_per_s}
        await self._monitor.execute("migrate-set-parameters", parameters, urgent=True)


async def set_mode(monitor: Monitor, mode: str) -> bool:
    """Sets QEMU's migration mode; False when this QEMU (before 8.2) has no modes. Raises as Monitor.execute does."""
    known = await monitor.execute("query-migrate-parameters")
    assert isinstance(known, dict)
    if _MODE not in known:
        return False
    if known[_MODE] != mode:
        await monitor.execute("migrate-set-parameters", {_MODE: mode})
    return True


def _channel(kind: str, path: str) -> Json:
    return {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": path}}
