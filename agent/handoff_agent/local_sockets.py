"""The Unix sockets over which a guest goes from one slot of its host to the other.

Their folders are on a memory file system, so nothing here blocks for long.
"""

import os
import pwd
import shutil
from pathlib import Path
from typing import Final

from handoff_common.errors import PreconditionError

UNIX = "unix:"
MULTIFD = "multifd:"
"""As "unix:", over several connections that QEMU makes itself."""
CPR = "cpr:"

_FLAGS_FIELD, _PATH_FIELD, _FIELDS = 3, 7, 8
# __SO_ACCEPTCON of include/uapi/linux/net.h.
_ACCEPTS: Final = 1 << 16


def is_local(uri: str) -> bool:
    """The guest goes to another slot of its host."""
    return uri.startswith((UNIX, MULTIFD, CPR))


def main_socket(folder: str) -> str:
    """Where the new QEMU takes the guest's state."""
    return f"{folder}/main"


def cpr_socket(folder: str) -> str:
    """Where the new QEMU takes the descriptors of the guest's memory."""
    return f"{folder}/cpr"


def listens(path: str) -> bool:
    """Whether a connection to the socket at `path` would be accepted: its file is there a moment before."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=_FIELDS - 1)
        if len(fields) == _FIELDS and fields[_PATH_FIELD] == path and int(fields[_FLAGS_FIELD], 16) & _ACCEPTS:
            return True
    return False


class LocalSockets:
    """A folder for each handoff. Only QEMU's own user may enter it, for the guest's memory passes through."""

    def __init__(self, runtime_dir: Path, qemu_user: str) -> None:
        self._root = runtime_dir / "handoffs"
        self._user = qemu_user

    def folder(self, migration_id: str) -> str:
        """The folder of a handoff, whether or not it exists."""
        return str(self._root / migration_id)

    def make(self, migration_id: str) -> None:
        """Makes the folder, empty. Raises PreconditionError when QEMU's user doesn't exist or it can't be made."""
        self.remove(migration_id)
        try:
            user = pwd.getpwnam(self._user)
            self._root.mkdir(mode=0o711, parents=True, exist_ok=True)
            folder = Path(self.folder(migration_id))
            folder.mkdir(mode=0o700)
            os.chown(folder, user.pw_uid, user.pw_gid)
        except KeyError:
            raise PreconditionError(f"no user {self._user} on this host; set qemu_user in the agent's file") from None
        except OSError as error:
            raise PreconditionError(f"no folder for sockets below {self._root}: {error.strerror}") from None

    def remove(self, migration_id: str) -> None:
        """Removes the folder, if there is one."""
        shutil.rmtree(self.folder(migration_id), ignore_errors=True)
