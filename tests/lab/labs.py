"""Labs of the tests, each in a directory of its own."""

import os
import shutil
import tempfile
from pathlib import Path

from handoff_lab.fleet import Fleet
from handoff_lab.state import DEFAULT_PREFIX, Lab


def new_lab() -> Lab:
    """A lab that is not up."""
    # A directory of its own: a lab that a developer has up is left alone.
    prefix = Path(os.environ.get("HANDOFF_PREFIX") or DEFAULT_PREFIX)
    return Lab(Path(tempfile.mkdtemp(prefix="hl-", dir="/var/tmp")), prefix)


def end_lab(lab: Lab) -> None:
    """Takes a lab down; its logs are kept where HANDOFF_TEST_LOGS says."""
    keep = os.environ.get("HANDOFF_TEST_LOGS")
    if keep and lab.directory.exists():
        shutil.copytree(
            lab.directory,
            Path(keep) / lab.directory.name,
            ignore=lambda directory, names: [n for n in names if not _is_log(Path(directory) / n)],
        )
    Fleet(lab).down()


def _is_log(path: Path) -> bool:
    return path.is_dir() or path.suffix in {".log", ".console", ".toml"}
