"""A node of the lab: a set of namespaces that lives as long as its first process.

Nodes are found by what they are, not by pid files: every first process carries the lab's directory and the node's name
in its environment. So a lab that was only half started, or lost its files, is still found and taken down whole.
"""

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from handoff_lab.errors import LabError
from handoff_lab.state import Lab

MARKER = "HANDOFF_LAB_NODE"
NAMESPACES = ("-n", "-m", "-u", "-i", "-p")
INIT = Path(__file__).with_name("node_init.sh")
START_DEADLINE_S = 20.0
STOP_DEADLINE_S = 20.0
COMMAND_DEADLINE_S = 30.0
POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Process:
    """A process of the lab: its pid here, its pid in its own namespace, and its pid namespace."""

    pid: int
    inner_pid: int
    namespace: str


def processes() -> Iterator[Process]:
    """Every process that is in a pid namespace below ours."""
    ours = str(Path("/proc/self/ns/pid").readlink())
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            namespace = str((entry / "ns/pid").readlink())
            if namespace == ours:
                continue
            status = (entry / "status").read_text()
        except OSError:  # it is gone
            continue
        inner = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1]
        yield Process(int(entry.name), int(inner), namespace)


def environment_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty when it is gone."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    return dict(item.split("=", 1) for item in raw.decode(errors="replace").split("\0") if "=" in item)


def wait_for(condition: Callable[[], bool], deadline_s: float, what: str) -> None:
    """Polls until the condition holds. Raises LabError that names `what` after the deadline."""
    until = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > until:
            raise LabError(f"{what} did not come about within {deadline_s:g} s")
        time.sleep(POLL_S)


@dataclass(frozen=True, slots=True)
class Node:
    """One node: a host, a controller, an etcd member, or the fabric between them."""

    lab: Lab
    name: str

    @property
    def directory(self) -> Path:
        """Everything of the node's on disk."""
        return self.lab.node(self.name)

    def pid(self) -> int | None:
        """The node's first process, as seen from here; None when the node is down."""
        return nodes(self.lab).get(self.name)

    def require_pid(self) -> int:
        """Like pid, but raises LabError when the node is down."""
        pid = self.pid()
        if pid is None:
            raise LabError(f"{self.name} is down: `handoff-lab up` starts what is missing")
        return pid

    def start(self, binds: Sequence[tuple[Path, str]] = (), own_srv: bool = False) -> int:
        """Starts the node unless it runs, and returns its pid. `binds`: directories and files it has of its own."""
        running = self.pid()
        if running is not None:
            return running
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "binds").write_text("".join(f"{source} {target}\n" for source, target in binds))
        if own_srv:
            (self.directory / "srv").touch()
        reader, writer = os.pipe()
        try:
            try:
                self._launch(writer)
            finally:
                os.close(writer)
            lines = _read_lines(reader, 2)
        finally:
            os.close(reader)
        if len(lines) != 2:
            raise LabError(f"{self.name} did not start: {tail(self.directory / 'init.log')}")
        return int(lines[0])

    def _launch(self, told: int) -> None:
        # setsid --fork: the node belongs to no terminal and is nobody's child.
        command = ["setsid", "--fork", "unshare", *NAMESPACES, "-f", "--kill-child"]
        with (self.directory / "init.log").open("ab") as log:
            subprocess.run(
                [*command, str(INIT), self.name, str(self.directory)],
                check=True,
                stdin=told,
                stdout=log,
                stderr=log,
                cwd="/",
                env={**base_environment(), MARKER: f"{self.lab.directory}:{self.name}"},
                timeout=START_DEADLINE_S,
            )

    def command(self, arguments: Sequence[str], pid: int | None = None) -> list[str]:
        """The command line that runs another one inside of the node."""
        return ["nsenter", "-t", str(pid or self.require_pid()), *NAMESPACES, "--", *arguments]

    def run(
        self, arguments: Sequence[str], stdin: str = "", deadline_s: float = COMMAND_DEADLINE_S, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command inside of the node. Raises LabError when it fails or misses the deadline."""
        return self._run(self.command(arguments), arguments, stdin, deadline_s, check)

    def run_in_network(self, arguments: Sequence[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Runs a command of the machine in the node's network, with pids and files as seen from here."""
        command = ["nsenter", "-t", str(self.require_pid()), "-n", "--", *arguments]
        return self._run(command, arguments, stdin, COMMAND_DEADLINE_S, True)

    def _run(
        self, command: Sequence[str], arguments: Sequence[str], stdin: str, deadline_s: float, check: bool
    ) -> subprocess.CompletedProcess[str]:
        try:
            done = subprocess.run(
                command,
                input=stdin,
                text=True,
                capture_output=True,
                timeout=deadline_s,
                env=base_environment(),
                cwd="/",
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise LabError(f"{self.name}: {arguments[0]} gave no answer within {deadline_s:g} s") from None
        if check and done.returncode != 0:
            raise LabError(f"{self.name}: {' '.join(arguments)[:200]}: {done.stderr.strip() or done.stdout.strip()}")
        return done

    def find(self, inner_pid: int) -> int | None:
        """The pid here of a process inside of the node; None when there is none."""
        pid = self.pid()
        if pid is None:
            return None
        namespace = str(Path(f"/proc/{pid}/ns/pid").readlink())
        return next((p.pid for p in processes() if p.namespace == namespace and p.inner_pid == inner_pid), None)

    def kill(self) -> None:
        """Powers the node off: everything in it dies at once. Nothing happens when it is down."""
        pid = self.pid()
        if pid is not None:
            kill_and_wait([pid])


def _read_lines(told: int, count: int) -> list[str]:
    """Up to that many lines, fewer when the writer has gone or the deadline is over."""
    text = b""
    until = time.monotonic() + START_DEADLINE_S
    while text.count(b"\n") < count and select.select([told], [], [], max(until - time.monotonic(), 0))[0]:
        chunk = os.read(told, 4096)
        if not chunk:
            break
        text += chunk
    return text.decode().splitlines()


def nodes(lab: Lab) -> dict[str, int]:
    """The running nodes of a lab, and the pid of each one's first process."""
    found: dict[str, int] = {}
    for process in processes():
        if process.inner_pid != 1:
            continue
        marker = environment_of(process.pid).get(MARKER, "")
        directory, _, name = marker.rpartition(":")
        if directory == str(lab.directory):
            found[name] = process.pid
    return found


def all_marked(lab: Lab) -> list[int]:
    """Every process that carries the lab's mark, also those of a node that is only half started."""
    prefix = f"{lab.directory}:"
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [pid for pid in pids if environment_of(pid).get(MARKER, "").startswith(prefix)]


def kill_and_wait(pids: Sequence[int]) -> None:
    """Kills processes and waits until they are gone; the first process of a namespace takes all others along."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), STOP_DEADLINE_S, "the end of the node")


def base_environment() -> Mapping[str, str]:
    """What processes of the lab see of our environment."""
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
    }


def tail(log: Path, lines: int = 5) -> str:
    """The last lines of a log, for an error message."""
    try:
        text = log.read_text(errors="replace").strip().splitlines()
    except FileNotFoundError:
        return f"no log at {log}"
    return " | ".join(text[-lines:]) or f"{log} is empty"
