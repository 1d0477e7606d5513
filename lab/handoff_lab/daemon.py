"""The daemons of a node: started, found, signalled and restarted one by one."""

import os
import signal
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from handoff_lab.errors import LabError
from handoff_lab.node import Node, base_environment, environment_of, tail, wait_for

READY_DEADLINE_S = 30.0
STOP_DEADLINE_S = 10.0
MARKER = "HANDOFF_LAB_DAEMON"


@dataclass(frozen=True, slots=True)
class Daemon:
    """A daemon of a node. `socket_path`, as seen from here, accepts connections when it is ready."""

    node: Node
    name: str
    arguments: tuple[str, ...]
    socket_path: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """Its standard output and error."""
        return self.node.directory / "log" / f"{self.name}.log"

    @property
    def _pid_file(self) -> Path:
        return self.node.directory / "run" / f"{self.name}.labpid"

    def pid(self) -> int | None:
        """Its pid as seen from here; None when it does not run."""
        try:
            inner = int(self._pid_file.read_text())
        except (FileNotFoundError, ValueError):
            return None
        pid = self.node.find(inner)
        # After a power-off the number may be another process's.
        return pid if pid is not None and environment_of(pid).get(MARKER) == self.name else None

    def launch(self) -> None:
        """Starts it unless it runs; does not wait until it is ready."""
        if self.pid() is not None:
            return
        if self.socket_path is not None:
            self.socket_path.unlink(missing_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._pid_file.parent.mkdir(parents=True, exist_ok=True)
        self._pid_file.unlink(missing_ok=True)
        script = 'echo $$ >"$1.new" && mv "$1.new" "$1" && shift && exec "$@"'
        inside = ["setsid", "--fork", "sh", "-c", script, "sh", str(self._pid_file), *self.arguments]
        with self.log.open("ab") as log:
            subprocess.run(
                self.node.command(inside),
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={**base_environment(), **self.environment, MARKER: self.name},
                timeout=READY_DEADLINE_S,
            )

    def ready(self) -> bool:
        """Whether it accepts connections."""
        if self.socket_path is None:
            return self._pid_file.exists()
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            try:
                probe.connect(str(self.socket_path))
            except OSError:
                return False
        return True

    def wait_ready(self) -> None:
        """Waits until it accepts connections. Raises LabError with the end of its log when it does not."""

        def ready_or_dead() -> bool:
            return self.ready() or (self._pid_file.exists() and self.pid() is None)

        wait_for(ready_or_dead, READY_DEADLINE_S, f"{self.name} of {self.node.name}")
        if not self.ready():
            raise LabError(f"{self.name} of {self.node.name} ended: {tail(self.log)}")

    def start(self) -> None:
        """Starts it unless it runs, and waits until it is ready."""
        self.launch()
        self.wait_ready()

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal. Raises LabError when it does not run."""
        pid = self.pid()
        if pid is None:
            raise LabError(f"{self.name} of {self.node.name} does not run")
        os.kill(pid, number)
        if number == signal.SIGKILL:
            wait_for(lambda: not Path(f"/proc/{pid}").exists(), STOP_DEADLINE_S, f"the end of {self.name}")

    def stop(self) -> None:
        """Ends it: asks first, kills after ten seconds. Nothing happens when it does not run."""
        pid = self.pid()
        if pid is None:
            return
        os.kill(pid, signal.SIGCONT)
        os.kill(pid, signal.SIGTERM)
        try:
            wait_for(lambda: not Path(f"/proc/{pid}").exists(), STOP_DEADLINE_S, f"the end of {self.name}")
        except LabError:
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: not Path(f"/proc/{pid}").exists(), STOP_DEADLINE_S, f"the end of {self.name}")

    def restart(self) -> None:
        """Ends it, starts it again and waits until it is ready."""
        self.stop()
        self.start()
