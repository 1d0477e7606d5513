"""qemu-img, for images that no QEMU of ours has to know about."""

import asyncio
import contextlib
import json
from typing import Final, cast

from handoff_common.errors import UnavailableError

INFO_TIMEOUT_S: Final = 10.0
_SAID: Final = 300


async def is_flat(path: str) -> bool:
    """Whether an image is backed by nothing. Raises UnavailableError when it can't be read."""
    try:
        async with asyncio.timeout(INFO_TIMEOUT_S):
            told = await qemu_img("info", "-U", "--output=json", path)
    except TimeoutError:
        raise UnavailableError(f"{path} can't be read within {INFO_TIMEOUT_S:g} s") from None
    return "backing-filename" not in cast(dict[str, object], json.loads(told))


async def qemu_img(*arguments: str) -> str:
    """Runs it for as long as it takes; it is killed when the caller is cancelled. Raises UnavailableError."""
    try:
        process = await asyncio.create_subprocess_exec(
            *("qemu-img", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise UnavailableError(f"qemu-img can't be run: {error.strerror}") from None
    try:
        stdout, stderr = await process.communicate()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode != 0:
        raise UnavailableError(f"qemu-img {arguments[0]}: {stderr.decode(errors='replace').strip()[-_SAID:]}")
    return stdout.decode()
