"""Checks docs/switch.pml, and that it finds the bugs seeded into it."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[2] / "docs" / "switch.pml"
DEADLINE_S = 120
MEMORY_MIB = 1500
DEPTH = 100_000


@dataclass(frozen=True)
class Property:
    """`build` and `check`: options of gcc and of the checker."""

    name: str
    build: tuple[str, ...] = ()
    check: tuple[str, ...] = ()


SAFE = Property("safe")
# Weak fairness: whoever can go on does so some time. It does not go together with partial order reduction here.
ENDS = Property("ends", ("-DNOREDUCE", "-DNFAIR=3"), ("-f",))


def errors(folder: Path, what: Property, *seeds: str) -> int:
    """Checks a property to the end or to the first violation; returns the number of violations."""

    def call(*command: str) -> str:
        done = subprocess.run(command, cwd=folder, timeout=DEADLINE_S, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    call("spin", "-a", *(f"-D{seed}" for seed in seeds), str(MODEL))
    # All is checked before an optimising compiler would be done.
    call("gcc", "-O0", "-w", f"-DMEMLIM={MEMORY_MIB}", *what.build, "-o", "pan", "pan.c")
    told = call("./pan", "-a", *what.check, "-N", what.name, f"-m{DEPTH}")
    assert "max search depth too small" not in told, told
    found = re.search(r"errors: (\d+)", told)
    assert found is not None, told
    if not int(found[1]):
        assert "Search not completed" not in told, told
    return int(found[1])


# The switch; and from its commit on, a fast migration whose disks are pulled.
WAYS = ((), ("PULL",))


@pytest.mark.parametrize("way", WAYS)
def test_never_two_run_and_the_record_is_first(tmp_path: Path, way: tuple[str, ...]) -> None:
    assert errors(tmp_path, SAFE, "FAULTS=1", *way) == 0


@pytest.mark.parametrize("way", WAYS)
def test_once_faults_stop_the_guest_runs_once(tmp_path: Path, way: tuple[str, ...]) -> None:
    assert errors(tmp_path, ENDS, "FAULTS=0", *way) == 0


@pytest.mark.parametrize("seed", ["BUG_SOURCE_TIMEOUT", "BUG_NO_COMPARE", "BUG_ABORT_FIRST", "BUG_FALSE_FENCE"])
def test_a_bug_against_safety_is_found(tmp_path: Path, seed: str) -> None:
    assert errors(tmp_path, SAFE, "FAULTS=1", seed) > 0


@pytest.mark.parametrize("seed", ["BUG_PULL_UNFENCED", "BUG_RELEASE_FIRST", "BUG_BACK_FROM_ARRIVED"])
def test_a_bug_against_a_pull_is_found(tmp_path: Path, seed: str) -> None:
    assert errors(tmp_path, SAFE, "FAULTS=1", "PULL", seed) > 0


def test_a_fence_that_is_forgotten_is_found(tmp_path: Path) -> None:
    assert errors(tmp_path, ENDS, "FAULTS=0", "BUG_FENCE_FORGOTTEN") > 0
