"""Which paths other hosts see."""

from pathlib import Path, PurePosixPath

import pytest

from handoff_agent.shared_storage import parse_mounts, shared_storage

MOUNTINFO = r"""22 1 0:20 / / rw,relatime - ext4 /dev/vda1 rw
30 22 0:33 / /srv/ceph rw - ceph mon1:/ rw
31 22 0:34 / /srv/with\040space rw shared:1 - ocfs2 /dev/sdb rw
32 30 0:35 / /srv/ceph/local rw - xfs /dev/sdc rw
33 22 0:36 / /srv/twice rw - xfs /dev/sdd rw
34 22 0:37 / /srv/twice rw - gfs2 /dev/sde rw
35 22 0:38 / /srv/nfs rw - nfs4 server:/export rw
"""


@pytest.mark.parametrize(
    ("path", "shared"),
    [
        ("/srv/ceph/a", True),
        ("/srv/ceph/local/a", False),
        ("/srv/with space/a", True),
        ("/srv/twice/a", True),
        ("/srv/nfs/a", False),
        ("/srv/cephalopod", False),
        ("/srv/shared/a", True),
        ("/srv/shared", True),
        ("/srv/sharedness", False),
        ("/", False),
    ],
)
def test_by_list_and_by_file_system(tmp_path: Path, path: str, shared: bool) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(MOUNTINFO)
    assert shared_storage(("/srv/shared",), mountinfo)(path) is shared


def test_this_machines_own_mounts() -> None:
    assert PurePosixPath("/") in parse_mounts(Path("/proc/self/mountinfo").read_text().splitlines())
    assert not shared_storage(())("/etc/hostname")
