"""The hook that lets a tenant's guest start only where an agent runs."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from handoff_agent.network.metadata import NAMESPACE

HOOK = Path(__file__).parents[3] / "systemd/libvirt-hook"
TENANTS = f"<domain><metadata><handoff:network xmlns:handoff='{NAMESPACE}'/></metadata></domain>"


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    """A file that is there while the agent runs, by the word of a systemctl of the test's own."""
    running = tmp_path / "running"
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f'#!/bin/sh\n[ "$*" = "--quiet is-active handoff-agent.service" ] && [ -e {running} ]\n')
    systemctl.chmod(0o755)
    return running


def hook(agent: Path, xml: str = TENANTS, *operation: str, tries: int = 0) -> subprocess.Popen[str]:
    environment = {**os.environ, "PATH": f"{agent.parent}:{os.environ['PATH']}", "HANDOFF_HOOK_TRIES": str(tries)}
    process = subprocess.Popen(
        [str(HOOK), "web", *(operation or ("prepare", "begin")), "-"],
        env=environment,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(xml)
    process.stdin.flush()
    process.stdin.close()
    process.stdin = None
    return process


def test_a_tenants_guest_does_not_start_without_an_agent(agent: Path) -> None:
    process = hook(agent)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 1
    assert said == "guest web has a port in a tenant's network, and no handoff-agent runs that would keep it apart\n"


def test_it_waits_for_one_that_starts(agent: Path) -> None:
    process = hook(agent, tries=50)
    time.sleep(0.3)
    assert process.poll() is None
    agent.touch()
    assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("xml", "operation"),
    [("<domain/>", ("prepare", "begin")), ("", ("release", "end")), ("", ("stopped", "end")), ("", ("start", "begin"))],
)
def test_everything_else_is_none_of_its_business(agent: Path, xml: str, operation: tuple[str, str]) -> None:
    assert hook(agent, xml, *operation).wait(10) == 0
