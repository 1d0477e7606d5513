"""Which paths of this host other hosts see with the same bytes."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Final

from handoff_agent.guests import IsShared, below_any

# File systems that keep all their hosts' caches coherent, so that the same path there is the same file. NFS is not
# among them: whether two hosts mount the same export is the operator's to say (shared_paths).
CLUSTER_FILE_SYSTEMS: Final = frozenset(
    {"ceph", "fuse.ceph", "fuse.ceph-fuse", "fuse.glusterfs", "gfs2", "gpfs", "lustre", "ocfs2", "beegfs"}
)
_MOUNTINFO: Final = Path("/proc/self/mountinfo")
_OCTAL: Final = re.compile(r"\\([0-7]{3})")


def shared_storage(shared_paths: tuple[str, ...], mountinfo: Path = _MOUNTINFO) -> IsShared:
    """A predicate: the path is below one of `shared_paths` or on a cluster file system, by the mounts of now.

    Reads the table of mounts only; never touches the file systems, which may hang.
    """
    is_listed = below_any(shared_paths)
    mounts = parse_mounts(mountinfo.read_text().splitlines())

    def is_shared(path: str) -> bool:
        return is_listed(path) or _file_system(path, mounts) in CLUSTER_FILE_SYSTEMS

    return is_shared


def parse_mounts(lines: Iterable[str]) -> dict[PurePosixPath, str]:
    """File system type by mount point, from the lines of mountinfo; the last mount on a point hides the others."""
    mounts: dict[PurePosixPath, str] = {}
    for line in lines:
        fields, _, rest = line.partition(" - ")
        mount_point = _OCTAL.sub(lambda match: chr(int(match[1], 8)), fields.split(" ")[4])
        mounts[PurePosixPath(mount_point)] = rest.split(" ")[0]
    return mounts


def _file_system(path: str, mounts: dict[PurePosixPath, str]) -> str:
    candidate = PurePosixPath(path)
    points = (candidate, *candidate.parents)
    return next((mounts[point] for point in points if point in mounts), "")
