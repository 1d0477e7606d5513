"""Image files of this host: looked at, made, removed. Blocking: call it on a thread.

An image for a guest that comes is made under a hidden name, its mark, and then linked to its own:

    create(mark), give_name(mark, path)
    remove(mark)                          the guest stays
    remove_marked(mark, path)             it does not

Whenever an agent dies in between, the mark tells the next one what it has made, and whether a file at the path is that.
"""

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
_NO_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


def look(paths: Sequence[str]) -> dict[str, PathFacts]:
    """What is at each path."""
    return {path: _look_at(Path(path)) for path in paths}


def mark_of(path: str, migration_id: str, target: str) -> str:
    """The hidden name beside `path` by which an image is known as made for this disk of this migration. Pure."""
    return str(Path(path).with_name(f".handoff-{migration_id}-{target}"))


def create(
    path: str, image_format: str, size_bytes: int, *, owner: str = "", cluster_bytes: int = 0, base_uri: str = ""
) -> None:
    """Makes an image of exactly this size with nothing allocated; it belongs to `owner`, a user.

    `base_uri`: what it is backed by (qcow2), not opened. Raises PreconditionError when something is at `path`, which is
    left as it is, or it can't be made; nothing is left of it then. Raises ExhaustedError when the disk is full.
    """
    try:
        image = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, _OWNER_ONLY)
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        raise _failure(path, error) from None
    try:
        options = [f"cluster_size={cluster_bytes}"] if cluster_bytes and image_format == "qcow2" else []
        backing = ["-u", "-b", base_uri, "-F", "raw"] if base_uri else []
        chosen = ["-o", ",".join(options)] if options else []
        command = ["qemu-img", "create", "-q", "-f", image_format, *chosen, *backing]
        _fill(command, image, str(size_bytes), path)
        if owner:
            user = pwd.getpwnam(owner)
            os.fchown(image, user.pw_uid, user.pw_gid)
    except BaseException as error:
        remove(path)
        if isinstance(error, OSError):
            raise _failure(path, error) from None
        if isinstance(error, KeyError):
            raise PreconditionError(
                f"no user {owner} on this host; set qemu_user in the agent's configuration"
            ) from None
        raise
    finally:
        os.close(image)


def give_name(mark: str, path: str) -> None:
    """Gives an image its name beside its mark; `remove_marked` finds by the mark whether the name is still its.

    Raises PreconditionError when another file is at `path`, which is left as it is, or the file system has no links.
    """
    try:
        os.link(mark, path)
    except FileExistsError:
        if not _are_one(mark, path):  # NFS says so too when the first answer was lost
            raise _exists(path) from None
    except OSError as error:
        if error.errno in _NO_LINKS:
            raise PreconditionError(f"{path}: its file system has no hard links, which images need") from None
        raise _failure(path, error) from None


def remove_marked(mark: str, path: str) -> None:
    """Removes an image by both its names, as far as they are there; another file at `path` stays.

    May be repeated, also when it was interrupted. Raises PreconditionError when it can't be done.
    """
    try:
        if _are_one(mark, path):
            Path(path).unlink(missing_ok=True)
        Path(mark).unlink(missing_ok=True)  # last: without it nobody knows the other
    except OSError as error:
        raise _failure(path, error) from None


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


def _are_one(mark: str, path: str) -> bool:
    """Whether both are there and the same file."""
    try:
        return os.path.samestat(os.lstat(mark), os.lstat(path))
    except FileNotFoundError:
        return False


def _fill(command: Sequence[str], image: int, size: str, path: str) -> None:
    """Runs qemu-img on an open file. `path`: its name, for the error."""
    # Not by its name: a qemu-img that outlives the agent for a moment would make a file anew that was removed.
    itself = f"/proc/self/fd/{image}"
    command = [*command, itself, size]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False, pass_fds=(image,)
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PreconditionError(f"{path}: {command[0]} could not be run: {error}") from None
    if done.returncode != 0:
        # The last line is the reason; before it qemu-img complains that it can't remove what has no name.
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise PreconditionError(f"{path}: {reason[0].replace(f'{itself}: ', '')}")


def _exists(path: str) -> PreconditionError:
    return PreconditionError(f"{path} exists; remove it, or rename it")


def _failure(path: str, error: OSError) -> HandoffError:
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return (ExhaustedError if is_full else PreconditionError)(f"{path}: {error.strerror}")
