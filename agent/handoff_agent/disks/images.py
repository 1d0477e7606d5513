"""Image files of this host: looked at, made, removed. Blocking: call it on a thread."""

import contextlib
import errno
import os
import pwd
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from handoff_agent.disks.space import PathFacts
from handoff_common.errors import ExhaustedError, HandoffError, PreconditionError

TOOL_TIMEOUT_S: Final = 20.0
_OWNER_ONLY: Final = 0o600
_BLOCK_BYTES: Final = 512


def look(paths: Sequence[str]) -> dict[str, PathFacts]:
    """What is at each path."""
    return {path: _look_at(Path(path)) for path in paths}


def create(
    path: str, image_format: str, size_bytes: int, *, owner: str = "", cluster_bytes: int = 0, base_uri: str = ""
) -> None:
    """Makes an image of exactly this size with nothing allocated; it belongs to `owner`, a user.

    `base_uri`: what it is backed by (qcow2), not opened. Raises PreconditionError when something is at `path`, which is
    left as it is, or it can't be made; nothing is left of it then. Raises ExhaustedError when the disk is full.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, _OWNER_ONLY))
    except FileExistsError:
        raise PreconditionError(f"{path} exists; remove it, or rename it") from None
    except OSError as error:
        raise _failure(path, error) from None
    try:
        options = [f"cluster_size={cluster_bytes}"] if cluster_bytes and image_format == "qcow2" else []
        backing = ["-u", "-b", base_uri, "-F", "raw"] if base_uri else []
        chosen = ["-o", ",".join(options)] if options else []
        _tool("qemu-img", "create", "-q", "-f", image_format, *chosen, *backing, path, str(size_bytes))
        if owner:
            user = pwd.getpwnam(owner)
            os.chown(path, user.pw_uid, user.pw_gid)
    except BaseException as error:
        remove(path)
        if isinstance(error, OSError):
            raise _failure(path, error) from None
        if isinstance(error, KeyError):
            raise PreconditionError(
                f"no user {owner} on this host; set qemu_user in the agent's configuration"
            ) from None
        raise


def remove(path: str) -> None:
    """Removes an image file, if there is one; a block device stays. Raises PreconditionError when it can't be done."""
    try:
        with contextlib.suppress(FileNotFoundError):
            if Path(path).is_file():
                Path(path).unlink()
    except OSError as error:
        raise _failure(path, error) from None


def flush(path: str) -> None:
    """Everything written to the image by anybody is on disk on return; does nothing when it is gone."""
    with contextlib.suppress(FileNotFoundError):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(file)
        finally:
            os.close(file)


def _look_at(path: Path) -> PathFacts:
    try:
        status = os.statvfs(path.parent)
        file_system = path.parent.stat().st_dev
    except OSError:
        return PathFacts(exists=os.path.lexists(path), folder_exists=False)
    return PathFacts(
        exists=os.path.lexists(path),
        file_system=file_system,
        free_bytes=status.f_bavail * status.f_frsize,
        allocated_bytes=_allocated_bytes(path),
    )


def _allocated_bytes(path: Path) -> int:
    try:
        return path.stat().st_blocks * _BLOCK_BYTES
    except OSError:
        return 0


def _tool(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PreconditionError(f"{command[0]} could not be run: {error}") from None
    if done.returncode != 0:
        raise PreconditionError(f"{' '.join(command[:2])}: {done.stderr.strip()[-300:]}")


def _failure(path: str, error: OSError) -> HandoffError:
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return (ExhaustedError if is_full else PreconditionError)(f"{path}: {error.strerror}")
