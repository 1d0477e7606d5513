"""Probing QEMU builds: the machine's own, and ones that misbehave."""

import asyncio
import os
import shutil
import time
from pathlib import Path

import pytest

from handoff_agent import emulators
from handoff_agent.emulators import (
    Emulators,
    parse_cpr,
    parse_device_types,
    parse_machine_types,
    parse_release,
    parse_usable_models,
)
from handoff_agent.settings import EmulatorSettings
from handoff_common.errors import UnavailableError
from handoff_lab.state import Lab

CAPABILITIES = """<domainCapabilities><cpu>
<mode name='host-model'><model fallback='forbid'>EPYC</model></mode>
<mode name='custom' supported='yes'><model usable='yes'>qemu64</model><model usable='no'>EPYC</model></mode>
</cpu></domainCapabilities>"""

GOOD = """#!/bin/sh
echo run >> "$0.runs"
case $1 in
-version) echo 'QEMU emulator version 10.0.2 (Debian 1:10.0.2)' ;;
-machine) printf 'Supported machines are:\\npc  alias of pc-i440fx-10.0\\npc-q35-10.0  Standard PC\\n' ;;
esac
"""


def script(path: Path, text: str) -> EmulatorSettings:
    path.write_text(text)
    path.chmod(0o755)
    return EmulatorSettings(name=path.name, path=str(path))


def runs(path: Path) -> int:
    return len(Path(f"{path}.runs").read_text().splitlines())


async def test_the_machines_own() -> None:
    path = shutil.which("qemu-system-x86_64")
    assert path is not None
    found = Emulators([EmulatorSettings(name="own", path=path)])
    await found.probe()
    (build,) = found.builds
    assert build.release.count(".") == 2
    assert {"pc", "q35", "none"} <= build.machine_types
    assert found.releases == {path: build.release}
    assert found.choose(release=build.release, path="/elsewhere") == build
    assert {"virtio-net-pci", "virtio-blk-pci"} <= build.device_types


async def test_what_fails_is_left_out_and_the_rest_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulators, "PROBE_TIMEOUT_S", 2.0)
    configured = [
        EmulatorSettings(name="missing", path=str(tmp_path / "missing")),
        script(tmp_path / "aborts", "#!/bin/sh\necho 'Only modules from the same build' >&2\nkill -ABRT $$\n"),
        script(tmp_path / "talks", "#!/bin/sh\necho hello\n"),
        script(tmp_path / "hangs", "#!/bin/sh\nexec sleep 60\n"),
        script(tmp_path / "good", GOOD),
    ]
    found = Emulators(configured)
    began = time.monotonic()
    await found.probe()
    assert time.monotonic() - began < 10
    assert [build.name for build in found.builds] == ["good"]
    assert found.builds[0].machine_types == {"pc", "pc-q35-10.0"}


async def test_an_unchanged_file_is_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "qemu"
    found = Emulators([script(path, GOOD)])
    await found.probe()
    await found.probe()
    assert runs(path) == 3
    path.write_text(GOOD.replace("10.0.2", "10.0.3"))
    os.utime(path, ns=(1, 1))
    await found.probe()
    assert runs(path) == 6
    assert found.releases == {str(path): "10.0.3"}
    path.unlink()
    await found.probe()
    assert found.builds == ()


async def test_cpu_models_of_both_types_count(tmp_path: Path) -> None:
    async def capabilities(path: str, virtualisation: str) -> str:
        if virtualisation == "kvm":
            raise UnavailableError("no kvm")
        return CAPABILITIES

    found = Emulators([script(tmp_path / "qemu", GOOD)], capabilities)
    await found.probe()
    assert found.builds[0].cpu_models == {"qemu64"}


async def test_capabilities_that_hang_do_not_hold_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def capabilities(path: str, virtualisation: str) -> str:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(emulators, "CAPABILITIES_TIMEOUT_S", 0.05)
    found = Emulators([script(tmp_path / "qemu", GOOD)], capabilities)
    await found.probe()
    assert found.builds[0].cpu_models == frozenset()


def test_parsers() -> None:
    assert parse_release("QEMU emulator version 7.2.22 (Debian 1:7.2)\nCopyright") == "7.2.22"
    assert parse_machine_types("Supported machines are:\nq35  Standard\n\n") == {"q35"}
    assert parse_usable_models(CAPABILITIES) == {"qemu64"}
    schema = '{"return": [{"name": "7", "meta-type": "enum", "values": ["normal", "cpr-transfer"]}]}'
    option = '{"return": [{"name": "aux-ram-share", "type": "bool"}]}'
    assert parse_cpr(f"{schema}\n{option}\n")
    for less in ("", schema, option, "hello", "[]", '{"error": {}}', schema.replace("cpr", "x")):
        assert not parse_cpr(less)
        assert parse_device_types(less) == frozenset()
    assert parse_device_types('{"return": [{"name": "nvme", "parent": "pci-device"}], "id": "devices"}') == {"nvme"}
    with pytest.raises(UnavailableError):
        parse_release("KVM 1.0")


async def test_cpr_is_asked() -> None:
    releases = Lab.from_environment().releases()
    found = Emulators([EmulatorSettings(name=each.name, path=str(each.emulator)) for each in releases])
    await found.probe()
    assert {build.name: build.cpr for build in found.builds} == {
        each.name: each.version >= (10, 0) for each in releases
    }
