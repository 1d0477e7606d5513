"""QEMU builds of the tests: real ones, probed once by the agent and by each libvirtd."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from handoff_agent.emulators import Emulators
from handoff_agent.settings import EmulatorSettings

QEMU = f"{os.environ.get('HANDOFF_PREFIX', '/opt/handoff')}/qemu-10.0/bin/qemu-system-x86_64"


@dataclass(frozen=True)
class Builds:
    """QEMU 10 as "old", once more as "new", and as "crash": one that ends when a guest is to come in."""

    paths: Mapping[str, str]
    emulators: Emulators

    @property
    def settings(self) -> tuple[EmulatorSettings, ...]:
        return tuple(EmulatorSettings(name=name, path=path) for name, path in self.paths.items())

    @classmethod
    async def probed(cls, directory: Path) -> "Builds":
        """`directory` is where the builds beside the first one are made."""
        new, crash = directory / "new-qemu", directory / "crash-qemu"
        new.write_text(f'#!/bin/sh\nexec {QEMU} "$@"\n')
        crash.write_text(f'#!/bin/sh\ncase "$*" in *incoming*) exit 1;; esac\nexec {QEMU} "$@"\n')
        for wrapper in (new, crash):
            wrapper.chmod(0o755)
        paths = {"old": QEMU, "new": str(new), "crash": str(crash)}
        emulators = Emulators([EmulatorSettings(name=name, path=path) for name, path in paths.items()])
        await emulators.probe()
        assert [build.name for build in emulators.builds] == list(paths)
        return cls(paths, emulators)
