"""Who may open a guest's network volumes, and when that changes.

Both hosts of a move have the volume open while it lasts: the destination's QEMU connects before the guest is there.
Storage that keeps an access list is told of it in time, by the provider that the configuration names for the volume:

    PREPARING   grant(volume, destination)     before its QEMU is started
    FINISHING   revoke(volume, source)         after its QEMU has ended, or could not be ended: a fence
    ABORTING    revoke(volume, destination)    the same

Each carries the revision of the migration's record, which grows with every write of any migration: a call that comes
late, after we have gone on or were replaced, can be told from the one that counts.

Volumes that no provider is named for may be opened by every host, as far as we are concerned.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Protocol

import grpc.aio

from handoff.agent.v1.types_pb2 import Disk, DiskPlacement
from handoff.storage.v1.access_pb2 import GrantAccessRequest, RevokeAccessRequest, Volume
from handoff.storage.v1.access_pb2_grpc import VolumeAccessServiceStub
from handoff_common.channel import open_channel
from handoff_common.errors import DeadlineError, HandoffError, PreconditionError, UnavailableError, from_rpc_error
from handoff_controller.settings import VolumeSettings

# Of what a command said; the end of it tells why it failed.
SAID_BYTES = 500


class VolumeProvider(Protocol):
    """One storage system's way to change an access list. Both calls are idempotent, and both raise HandoffError.

    `revision`: of two calls for one volume and host that with the higher one is the later, however they arrive.
    """

    async def grant(self, volume: Volume, host: str, revision: int) -> None:
        """Lets the host open the volume, beside those that may already."""

    async def revoke(self, volume: Volume, host: str, revision: int) -> None:
        """Shuts the host out: once this returns, nothing that it sends is written."""

    async def close(self) -> None:
        """Lets go of what the provider holds."""


class ServiceProvider:
    """A storage system that serves handoff.storage.v1.VolumeAccessService."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._channel = open_channel(address)
        self._stub = VolumeAccessServiceStub(self._channel)

    async def grant(self, volume: Volume, host: str, revision: int) -> None:
        """See VolumeProvider."""
        request = GrantAccessRequest(volume=volume, host=host, revision=revision)
        await self._answer(lambda: self._stub.GrantAccess(request, timeout=self._timeout_s))

    async def revoke(self, volume: Volume, host: str, revision: int) -> None:
        """See VolumeProvider."""
        request = RevokeAccessRequest(volume=volume, host=host, revision=revision)
        await self._answer(lambda: self._stub.RevokeAccess(request, timeout=self._timeout_s))

    async def close(self) -> None:
        """See VolumeProvider."""
        await self._channel.close()

    async def _answer(self, call: Callable[[], Awaitable[object]]) -> None:
        try:
            await call()
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, f"storage at {self._address}") from error


class CommandProvider:
    """A program of the site: COMMAND grant|revoke PROTOCOL:NAME HOST. Exit status 0 means that it is done.

    It runs as the controller does, with the servers in HANDOFF_VOLUME_SERVERS, each "host:port", with blanks between,
    and the revision in HANDOFF_VOLUME_REVISION.
    """

    def __init__(self, command: Sequence[str], timeout_s: float) -> None:
        self._command = tuple(command)
        self._timeout_s = timeout_s

    async def grant(self, volume: Volume, host: str, revision: int) -> None:
        """See VolumeProvider."""
        await self._run("grant", volume, host, revision)

    async def revoke(self, volume: Volume, host: str, revision: int) -> None:
        """See VolumeProvider."""
        await self._run("revoke", volume, host, revision)

    async def close(self) -> None:
        """See VolumeProvider."""

    async def _run(self, verb: str, volume: Volume, host: str, revision: int) -> None:
        words = (*self._command, verb, label(volume), host)
        try:
            process = await asyncio.create_subprocess_exec(
                *words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={
                    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                    "HANDOFF_VOLUME_SERVERS": " ".join(volume.servers),
                    "HANDOFF_VOLUME_REVISION": str(revision),
                },
                start_new_session=True,
            )
        except OSError as error:
            raise UnavailableError(f"{words[0]} can't be run: {error.strerror}") from error
        try:
            async with asyncio.timeout(self._timeout_s):
                said, _ = await process.communicate()
        except TimeoutError:
            raise DeadlineError(f"`{' '.join(words)}` did not end within {self._timeout_s:g} s") from None
        finally:
            # Also what it has left behind: nothing of it may come to change the access later.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if process.returncode != 0:
            why = said.decode(errors="replace").strip()[-SAID_BYTES:] or "it said nothing"
            raise UnavailableError(f"`{' '.join(words)}` failed with status {process.returncode}: {why}")


class Volumes:
    """The providers, by the configuration: the first whose protocol and name match is asked."""

    def __init__(self, settings: Sequence[VolumeSettings]) -> None:
        self._providers = [(each, _provider(each)) for each in settings]

    async def close(self) -> None:
        """Closes every provider."""
        await asyncio.gather(*(provider.close() for _, provider in self._providers))

    async def grant(self, volume: Volume, host: str, revision: int) -> None:
        """Lets the host open the volume. Raises HandoffError that names both."""
        await self._change("given to", volume, host, lambda provider: provider.grant(volume, host, revision))

    async def revoke(self, volume: Volume, host: str, revision: int) -> None:
        """Shuts the host out of the volume. Raises HandoffError that names both."""
        await self._change("taken from", volume, host, lambda provider: provider.revoke(volume, host, revision))

    async def _change(
        self, what: str, volume: Volume, host: str, call: Callable[[VolumeProvider], Awaitable[None]]
    ) -> None:
        provider = self._of(volume)
        if provider is None:
            return
        try:
            await call(provider)
        except HandoffError as error:
            raise type(error)(f"volume {label(volume)} can't be {what} {host}: {error.message}") from error

    def _of(self, volume: Volume) -> VolumeProvider | None:
        for settings, provider in self._providers:
            if fnmatchcase(volume.protocol, settings.protocol) and fnmatchcase(volume.name, settings.name):
                return provider
        return None


def label(volume: Volume) -> str:
    """How a volume is called in messages, and to commands: "nbd:web"."""
    return f"{volume.protocol}:{volume.name}"


def network_volumes(disks: Iterable[Disk]) -> list[Volume]:
    """The network volumes among a guest's disks, each once. Pure."""
    found: list[Volume] = []
    for disk in disks:
        if disk.placement != DiskPlacement.DISK_PLACEMENT_NETWORK:
            continue
        protocol, _, name = disk.source.partition(":")
        volume = Volume(protocol=protocol, name=name, servers=disk.servers)
        if volume not in found:
            found.append(volume)
    return found


def check_unchanged(guest: str, planned: Sequence[Volume], now: Sequence[Volume]) -> None:
    """Raises PreconditionError when a volume was attached or detached since the plan was made. Pure."""
    if sorted(map(label, planned)) != sorted(map(label, now)):
        was, there = (", ".join(map(label, volumes)) or "none" for volumes in (planned, now))
        raise PreconditionError(f"the volumes of {guest} have changed since it was planned: {was}; now {there}. Retry")


def _provider(settings: VolumeSettings) -> VolumeProvider:
    if settings.service:
        return ServiceProvider(settings.service, settings.timeout_s)
    return CommandProvider(settings.command, settings.timeout_s)
