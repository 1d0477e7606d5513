"""qemu-img, for images that no QEMU of ours has to know about."""

import asyncio
import contextlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Final, cast

from handoff_agent.children import WITH_US
from handoff_common.errors import UnavailableError

INFO_TIMEOUT_S: Final = 10.0
_SAID: Final = 300
_CHUNK_BYTES: Final = 1 << 16
_PERCENT: Final = re.compile(rb"\(([0-9.]+)/100%\)")


def options(image: Mapping[str, str]) -> str:
    """An image, and how it is opened, as --image-opts takes it. Pure."""
    return ",".join(f"{name}={value.replace(',', ',,')}" for name, value in image.items())


async def is_flat(path: str) -> bool:
    """Whether an image is backed by nothing. Raises UnavailableError when it can't be read."""
    try:
        async with asyncio.timeout(INFO_TIMEOUT_S):
            told = await qemu_img("info", "-U", "--output=json", path)
    except TimeoutError:
        raise UnavailableError(f"{path} can't be read within {INFO_TIMEOUT_S:g} s") from None
    return "backing-filename" not in cast(dict[str, object], json.loads(told))


async def qemu_img(*arguments: str, on_progress: Callable[[float], None] | None = None) -> str:
    """Runs it for as long as it takes; it is killed when the caller is cancelled, or dies. Raises UnavailableError.

    One that was left would have the image locked, and nobody would hear how far it is.

    `on_progress`: hears the percentage that is done, of a command with -p.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *(*WITH_US, "qemu-img", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise UnavailableError(f"qemu-img can't be run: {error.strerror}") from None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        told, said, _ = await asyncio.gather(_heard(process.stdout, on_progress), process.stderr.read(), process.wait())
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode != 0:
        raise UnavailableError(f"qemu-img {arguments[0]}: {said.decode(errors='replace').strip()[-_SAID:]}")
    return told.decode()


async def _heard(stream: asyncio.StreamReader, on_progress: Callable[[float], None] | None) -> bytes:
    heard = b""
    while chunk := await stream.read(_CHUNK_BYTES):
        heard += chunk
        if on_progress is not None and (percents := _PERCENT.findall(chunk)):
            on_progress(float(percents[-1]))
    return heard
