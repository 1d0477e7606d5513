"""TCP connections to exports, which must not hold QEMU up: while it waits for one in its main loop, its guest waits."""

import asyncio
from typing import Final

import structlog

from handoff_agent.disks.uris import ExportUri
from handoff_common.errors import PreconditionError

log = structlog.get_logger()

TIMEOUT_S: Final = 2.0
_GREETING: Final = b"NBDMAGIC"


async def check_connection(export: ExportUri) -> None:
    """Connects once, and hears the server's greeting. Raises PreconditionError when that takes TIMEOUT_S, or fails."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await asyncio.open_connection(export.host, export.port)
            try:
                await reader.readexactly(len(_GREETING))
            finally:
                writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        if isinstance(error, asyncio.IncompleteReadError):
            reason = "the connection was closed at once"
        else:
            reason = str(error) or f"no answer in {TIMEOUT_S:.0f} s"
        raise PreconditionError(
            f"can't connect to the export {export}: {reason}; is the migration network up?"
        ) from error


async def kill_connections(export: ExportUri) -> None:
    """Ends this host's connections to an export's port, which only the disks of one handoff use. Failures are logged.

    Needs a kernel with CONFIG_INET_DIAG_DESTROY, as distributions have it.
    """
    process = await asyncio.create_subprocess_exec(
        *("ss", "-K", "-H", "-t", "dst", export.host, "dport", "=", str(export.port)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            _, stderr = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        log.warning("connections not cut", export=str(export), error="ss hangs")
        return
    if process.returncode != 0:
        log.warning("connections not cut", export=str(export), error=stderr.decode(errors="replace").strip())
