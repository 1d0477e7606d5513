"""The units and example configuration that a deployment starts from."""

import re
import shutil
import subprocess
import tomllib
import uuid
from pathlib import Path

import pytest

from handoff_agent.settings import AgentSettings
from handoff_common.config import Settings, load_settings
from handoff_controller.settings import ControllerSettings

SYSTEMD = Path(__file__).parents[3] / "systemd"
UNITS = sorted(path.name for path in SYSTEMD.glob("*.service"))
# What the units start; verify wants to see the files.
PROGRAMS = (
    "usr/bin/handoff-agent",
    "usr/bin/handoff-controller",
    "usr/lib/handoff/init-slot",
    "usr/sbin/libvirtd",
    "bin/kill",
)
SPECIAL_UNITS = Path("/lib/systemd/system")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system with our units, systemd's own, and stubs of the programs: as after an installation."""
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    for unit in UNITS:
        shutil.copy(SYSTEMD / unit, units)
    own = tmp_path / "lib/systemd/system"
    shutil.copytree(SPECIAL_UNITS, own, symlinks=True, ignore=shutil.ignore_patterns("*.wants", "*.d"))
    for program in PROGRAMS:
        path = tmp_path / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("unit", UNITS)
def test_units_verify_clean(root: Path, unit: str) -> None:
    name = unit.replace("@.", "@b.")
    verified = subprocess.run(
        ["systemd-analyze", "verify", f"--root={root}", "--man=no", "--recursive-errors=no", name],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")


def test_verify_sees_the_units(root: Path) -> None:
    """A misspelt setting is found: the check above does look."""
    unit = root / "etc/systemd/system/handoff-agent.service"
    unit.write_text(unit.read_text().replace("KillMode=process", "KillMood=process"))
    verified = subprocess.run(
        ["systemd-analyze", "verify", f"--root={root}", "--man=no", "--recursive-errors=no", unit.name],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "KillMood" in verified.stderr


@pytest.mark.parametrize(("example", "kind"), [("agent.toml", AgentSettings), ("controller.toml", ControllerSettings)])
def test_examples_load(example: str, kind: type[Settings]) -> None:
    load_settings(SYSTEMD / example, kind)


@pytest.mark.parametrize(("example", "kind"), [("agent.toml", AgentSettings), ("controller.toml", ControllerSettings)])
def test_examples_name_every_setting(example: str, kind: type[Settings], tmp_path: Path) -> None:
    """With all comments that show a setting taken for real, the file still loads and leaves nothing out."""
    text = re.sub(r"^# (?=\[|\w+ = )", "", (SYSTEMD / example).read_text(), flags=re.MULTILINE)
    full = tmp_path / example
    full.write_text(text)
    load_settings(full, kind)
    assert set(tomllib.loads(text)) == set(kind.model_fields)


def test_a_slot_is_made_once(tmp_path: Path) -> None:
    theirs = tmp_path / "etc/libvirt"
    theirs.mkdir(parents=True)
    (theirs / "qemu.conf").write_text('# user = "x"\nuser = "libvirt-qemu"\nstdio_handler = "logd"\n')

    def init() -> tuple[str, str]:
        subprocess.run([SYSTEMD / "init-slot", "b"], env={"HANDOFF_ROOT": str(tmp_path)}, check=True)
        slot = tmp_path / "etc/handoff/slots/b"
        return (slot / "libvirtd.conf").read_text(), (slot / "qemu.conf").read_text()

    libvirtd_conf, qemu_conf = init()
    host_uuid = re.search(r'^host_uuid = "(.*)"$', libvirtd_conf, re.MULTILINE)
    assert host_uuid
    assert uuid.UUID(host_uuid[1])
    assert [line for line in qemu_conf.splitlines() if not line.startswith("#")] == [
        'user = "libvirt-qemu"',
        'stdio_handler = "file"',
    ]
    assert init() == (libvirtd_conf, qemu_conf)
