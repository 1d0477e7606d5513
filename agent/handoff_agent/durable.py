"""Small files that are replaced whole and are on disk on return, also when no room is left.

An agent that can't write down what it is about to do may not do it, and a guest may stand still meanwhile. So a few
files of the right size lie ready: with the disk full, one of them is overwritten and takes the place of the old.
"""

import errno
import os
from pathlib import Path
from typing import Final

import structlog

log = structlog.get_logger()

SPARE_BYTES: Final = 64 << 10
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


class DurableFolder:
    """A folder of such files. Blocking: call it on a thread, one at a time."""

    def __init__(self, folder: Path, spares: int) -> None:
        """Uses a folder that exists, and lays `spares` files ready in it."""
        self._folder = folder
        self._spares = [folder / f"spare-{number}" for number in range(spares)]
        self._stock_up()

    def replace(self, path: Path, text: str) -> None:
        """Writes a file of the folder. Raises OSError when there is no room and no spare is left, or large enough."""
        data = text.encode()
        temporary = path.with_suffix(".new")
        try:
            _write(temporary, data, os.O_CREAT | os.O_TRUNC)
        except OSError as error:
            if error.errno not in _FULL or not self._use_spare(temporary, data):
                raise
        else:
            self._stock_up()
        temporary.replace(path)
        _sync_folder(path.parent)

    def _use_spare(self, temporary: Path, data: bytes) -> bool:
        temporary.unlink(missing_ok=True)
        spare = next((spare for spare in self._spares if spare.exists()), None)
        if spare is None or len(data) > SPARE_BYTES:
            return False
        log.warning("the disk is full; a spare file is used", folder=str(self._folder))
        spare.replace(temporary)
        _write(temporary, data, 0)
        return True

    def _stock_up(self) -> None:
        """Lays spares ready as long as there is room."""
        for spare in self._spares:
            if spare.exists():
                continue
            try:
                # Not zeros by fallocate: some file systems promise room for those, and ask for it at the first write.
                _write(spare, b"\xff" * SPARE_BYTES, os.O_CREAT | os.O_TRUNC)
            except OSError as error:
                spare.unlink(missing_ok=True)
                log.warning("no room for a spare file", folder=str(self._folder), error=error.strerror)
                return


def _write(path: Path, data: bytes, flags: int) -> None:
    """Overwrites from the beginning, then cuts off the rest: blocks that a file has are not asked for again."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        file.truncate(len(data))
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
