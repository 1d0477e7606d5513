"""Reads the guests' ports from Open vSwitch's database."""

import asyncio
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import ovs.db.idl
import ovs.poller

from handoff_common.errors import DeadlineError, PreconditionError

READ_TIMEOUT_S: Final = 5.0
# What libvirt writes on the interfaces that it plugs in, and OpenStack's os-vif on those that it plugs in itself.
_DOMAIN_KEYS: Final = ("vm-id", "vm-uuid")
_MAC_KEY: Final = "attached-mac"

_COLUMNS: Final = {
    "Bridge": {"name": "string", "ports": {"key": {"type": "uuid", "refTable": "Port"}, "min": 0, "max": "unlimited"}},
    "Port": {
        "name": "string",
        "interfaces": {"key": {"type": "uuid", "refTable": "Interface"}, "min": 1, "max": "unlimited"},
    },
    "Interface": {
        "name": "string",
        "ofport": {"key": "integer", "min": 0, "max": 1},
        "external_ids": {"key": "string", "value": "string", "min": 0, "max": "unlimited"},
    },
}
# The part of Open_vSwitch's schema that we read; it has been the same since OVS 1.0.
_SCHEMA: Final = {
    "name": "Open_vSwitch",
    "version": "8.0.0",
    "tables": {
        table: {"columns": {name: {"type": kind} for name, kind in columns.items()}, "isRoot": True}
        for table, columns in _COLUMNS.items()
    },
}


@dataclass(frozen=True, slots=True)
class GuestPort:
    """A port that was plugged in for a domain."""

    name: str
    bridge: str
    ofport: int
    """OpenFlow number; -1 when the switch could not open the device, or has not yet."""
    mac: str
    domain_uuid: str


class OvsPorts:
    """One reader at a time, on a thread of its own: the IDL blocks."""

    def __init__(self, remote: str) -> None:
        """`remote`: the database, such as "unix:/run/openvswitch/db.sock"."""
        self._remote = remote
        self._thread = ThreadPoolExecutor(1, "ovsdb")

    async def read(self) -> tuple[GuestPort, ...]:
        """The ports of all domains, by name. PreconditionError without Open vSwitch, DeadlineError if it hangs."""
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + READ_TIMEOUT_S
        return await loop.run_in_executor(self._thread, _read, self._remote, deadline)

    def close(self) -> None:
        """Lets a reading end within its deadline, and takes no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _read(remote: str, deadline: float) -> tuple[GuestPort, ...]:
    _check_present(remote)
    idl = ovs.db.idl.Idl(remote, _schema_helper())
    try:
        while True:
            idl.run()
            if idl.has_ever_connected():
                return _guest_ports(idl)
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise DeadlineError(f"Open vSwitch's database at {remote} did not answer within {READ_TIMEOUT_S:g} s")
            poller = ovs.poller.Poller()
            idl.wait(poller)
            poller.timer_wait(int(remaining_s * 1000) + 1)
            poller.block()
    finally:
        idl.close()


def _schema_helper() -> ovs.db.idl.SchemaHelper:
    helper = ovs.db.idl.SchemaHelper(schema_json=_SCHEMA)
    for table, columns in _COLUMNS.items():
        helper.register_columns(table, list(columns))
    return helper


def _check_present(remote: str) -> None:
    """The IDL would try for ever to reach a database that isn't there."""
    path = remote.removeprefix("unix:")
    if path == remote:
        return
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(READ_TIMEOUT_S)
            probe.connect(path)
    except OSError as error:
        raise PreconditionError(
            f"no Open vSwitch at {remote} ({error.strerror or error}): install and start openvswitch-switch, or set"
            " ovs_database in the agent's configuration"
        ) from None


def _guest_ports(idl: ovs.db.idl.Idl) -> tuple[GuestPort, ...]:
    found: list[GuestPort] = []
    for bridge in idl.tables["Bridge"].rows.values():
        interfaces = [interface for port in bridge.ports for interface in port.interfaces]
        for interface in interfaces:
            ids: Mapping[str, str] = interface.external_ids
            domain_uuid = next((ids[key] for key in _DOMAIN_KEYS if key in ids), "")
            if domain_uuid:
                found.append(
                    GuestPort(
                        name=interface.name,
                        bridge=bridge.name,
                        ofport=_number(interface.ofport),
                        mac=ids.get(_MAC_KEY, "").lower(),
                        domain_uuid=domain_uuid.lower(),
                    )
                )
    return tuple(sorted(found, key=lambda port: port.name))


def _number(ofport: Sequence[int]) -> int:
    return ofport[0] if ofport else -1
