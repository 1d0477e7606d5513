"""QMP to the QEMU of one domain, through libvirt's monitor pass-through."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Final, TypeAlias, cast

import grpc
import libvirt
import libvirt_qemu

from handoff_agent.slots import CALL_TIMEOUT_S, Slot
from handoff_common.errors import HandoffError

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"


# Those of `-device`, with and without an id; what the machine has by itself is the machine type's.
_DEVICE_FOLDERS: Final = ("/machine/peripheral", "/machine/peripheral-anon")
_CHILD: Final = re.compile(r"child<(.+)>")


class QmpError(HandoffError):
    """QEMU refused a command (INTERNAL). `error_class` is QMP's, such as "GenericError" or "CommandNotFound"."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    def __init__(self, command: str, error_class: str, desc: str) -> None:
        super().__init__(f"QEMU refused {command}: {desc}")
        self.command = command
        self.error_class = error_class
        self.desc = desc


class MigrationStatus(StrEnum):
    """QEMU's MigrationStatus, as far as we meet it."""

    NONE = "none"
    SETUP = "setup"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    COMPLETED = "completed"
    FAILED = "failed"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    WAIT_UNPLUG = "wait-unplug"
    OTHER = "other"

    @classmethod
    def parse(cls, text: str) -> "MigrationStatus":
        """Reads QEMU's word; one that we never ask for (post-copy, COLO) is OTHER."""
        try:
            return cls(text)
        except ValueError:
            return cls.OTHER


@dataclass(frozen=True, slots=True)
class MigrationInfo:
    """One answer of query-migrate. Figures that QEMU does not give yet are 0."""

    status: MigrationStatus
    ram_total_bytes: int = 0
    ram_transferred_bytes: int = 0
    ram_remaining_bytes: int = 0
    throughput_bytes_per_s: int = 0
    dirty_bytes_per_s: int = 0
    iterations: int = 0
    cpu_throttle_percent: int = 0
    downtime_ms: int = 0
    expected_downtime_ms: int = 0
    total_ms: int = 0
    blocked_reasons: tuple[str, ...] = ()
    error_desc: str = ""
    ports: tuple[int, ...] = ()


def parse_migration(reply: Mapping[str, Json]) -> MigrationInfo:
    """Reads the answer of query-migrate."""
    ram = cast(Mapping[str, Json], reply.get("ram") or {})
    addresses = cast(Sequence[Mapping[str, Json]], reply.get("socket-address") or ())
    page_bytes = _int(ram, "page-size") or 4096
    return MigrationInfo(
        status=MigrationStatus.parse(str(reply.get("status", "none"))),
        ram_total_bytes=_int(ram, "total"),
        ram_transferred_bytes=_int(ram, "transferred"),
        ram_remaining_bytes=_int(ram, "remaining"),
        throughput_bytes_per_s=int(_float(ram, "mbps") * 1e6 / 8),
        dirty_bytes_per_s=_int(ram, "dirty-pages-rate") * page_bytes,
        iterations=_int(ram, "dirty-sync-count"),
        cpu_throttle_percent=_int(reply, "cpu-throttle-percentage"),
        downtime_ms=_int(reply, "downtime"),
        expected_downtime_ms=_int(reply, "expected-downtime"),
        total_ms=_int(reply, "total-time"),
        blocked_reasons=tuple(str(reason) for reason in cast(Sequence[Json], reply.get("blocked-reasons") or ())),
        error_desc=str(reply.get("error-desc", "")),
        ports=tuple(int(str(address["port"])) for address in addresses if "port" in address),
    )


def _int(values: Mapping[str, Json], key: str) -> int:
    return int(_float(values, key))


def _float(values: Mapping[str, Json], key: str) -> float:
    value = values.get(key)
    return float(value) if isinstance(value, int | float) else 0.0


class Monitor:
    """QMP commands to one domain. libvirt runs one at a time for each domain."""

    def __init__(self, slot: Slot, uuid: str) -> None:
        self.slot = slot
        self.uuid = uuid

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Json] | None = None,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        urgent: bool = False,
    ) -> Json:
        """Runs a command and returns its result. Raises QmpError when QEMU refuses, and as Slot.call does."""
        text = _encode(command, arguments)
        reply = await self.slot.on_domain(
            self.uuid,
            lambda domain: cast(str, libvirt_qemu.qemuMonitorCommand(domain, text, 0)),
            timeout_s,
            urgent=urgent,
        )
        return _decode(command, reply)

    async def execute_with_fd(
        self,
        command: str,
        arguments: Mapping[str, Json],
        fd: int,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Json:
        """Runs a command that takes a file descriptor with it (`getfd`, `add-fd`); `fd` stays the caller's."""
        text = _encode(command, arguments)

        def run(domain: libvirt.virDomain) -> str:
            reply, _files = libvirt_qemu.qemuMonitorCommandWithFiles(domain, text, [fd], 0)
            return cast(str, reply)

        return _decode(command, await self.slot.on_domain(self.uuid, run, timeout_s))

    async def query_migrate(self, *, timeout_s: float = CALL_TIMEOUT_S, urgent: bool = False) -> MigrationInfo:
        """Reads QEMU's view of the migration, in either direction."""
        reply = await self.execute("query-migrate", timeout_s=timeout_s, urgent=urgent)
        return parse_migration(cast(Mapping[str, Json], reply))

    async def query_status(self, *, timeout_s: float = CALL_TIMEOUT_S, urgent: bool = False) -> str:
        """Reads QEMU's run state: "running", "paused", "inmigrate", "postmigrate", "finish-migrate"…"""
        reply = await self.execute("query-status", timeout_s=timeout_s, urgent=urgent)
        return str(cast(Mapping[str, Json], reply)["status"])

    async def query_release(self) -> tuple[int, int, int]:
        """Reads QEMU's release as numbers, such as (10, 0, 2)."""
        reply = cast(Mapping[str, Mapping[str, Mapping[str, int]]], await self.execute("query-version"))
        release = reply["qemu"]
        numbers = cast(Mapping[str, int], release)
        return numbers["major"], numbers["minor"], numbers["micro"]

    async def query_device_types(self) -> frozenset[str]:
        """Reads the types of the devices that the guest was given, such as "virtio-net-pci"."""
        found: set[str] = set()
        for folder in _DEVICE_FOLDERS:
            entries = cast(Sequence[Mapping[str, str]], await self.execute("qom-list", {"path": folder}))
            found |= {match[1] for entry in entries if (match := _CHILD.fullmatch(entry["type"])) is not None}
        return frozenset(found)

    async def query_capabilities(self) -> dict[str, bool]:
        """Reads the migration capabilities that this QEMU knows, and which are on."""
        reply = cast(Sequence[Mapping[str, Json]], await self.execute("query-migrate-capabilities"))
        return {str(each["capability"]): bool(each["state"]) for each in reply}

    async def set_capabilities(self, capabilities: Mapping[str, bool]) -> None:
        """Switches migration capabilities; those not named stay as they are."""
        states: list[Json] = [{"capability": name, "state": state} for name, state in capabilities.items()]
        if not states:
            return
        await self.execute("migrate-set-capabilities", {"capabilities": states})


def _encode(command: str, arguments: Mapping[str, Json] | None) -> str:
    message: dict[str, Json] = {"execute": command}
    if arguments:
        message["arguments"] = arguments
    return json.dumps(message)


def _decode(command: str, text: str) -> Json:
    reply = json.loads(text)
    if "error" in reply:
        raise QmpError(command, reply["error"].get("class", ""), reply["error"].get("desc", ""))
    return cast(Json, reply.get("return"))
