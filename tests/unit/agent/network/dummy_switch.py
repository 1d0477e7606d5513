"""A real Open vSwitch whose datapath and ports are dummies: no root, no interfaces."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

SCHEMA = "/usr/share/openvswitch/vswitch.ovsschema"
QUIET = ("-vconsole:off", "-vsyslog:off", "--no-chdir")
BRIDGE = "br-int"


@dataclass
class DummySwitch:
    """One ovsdb-server and one ovs-vswitchd, with all that is theirs in `folder`."""

    folder: Path
    vswitchd: subprocess.Popen[bytes] | None = None

    @property
    def database(self) -> str:
        return f"unix:{self.folder}/db.sock"

    @property
    def management(self) -> Path:
        return self.folder / f"{BRIDGE}.mgmt"

    def vsctl(self, *words: str, wait: bool = True) -> str:
        command = ["ovs-vsctl", f"--db={self.database}", "--timeout=10", *([] if wait else ["--no-wait"]), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def plug(self, port: str, uuid: str = "", mac: str = "") -> None:
        ids = [f'external_ids:vm-id="{uuid}"', f'external_ids:attached-mac="{mac}"'] if uuid else []
        self.vsctl("add-port", BRIDGE, port, "--", "set", "Interface", port, "type=dummy", *ids)

    def unplug(self, port: str) -> None:
        self.vsctl("del-port", BRIDGE, port)

    def ofctl(self, *words: str) -> str:
        command, *rest = words
        if command == "--stats":
            stats, (command, *rest) = [], rest
        else:
            stats = ["--no-stats"]
        arguments = ["ovs-ofctl", "-O", "OpenFlow14", *stats, command, f"unix:{self.management}", *rest]
        return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout

    def flows(self, *match: str) -> list[str]:
        """The flows without their counters, sorted."""
        lines = self.ofctl("dump-flows", *match).splitlines()
        return sorted(line.strip() for line in lines if "actions=" in line)

    def start(self) -> None:
        environment = {**os.environ, "OVS_RUNDIR": str(self.folder)}
        command = ["ovs-vswitchd", self.database, "--enable-dummy=override", "--disable-system", *QUIET]
        log, control = f"--log-file={self.folder}/vswitchd.log", f"--unixctl={self.folder}/vswitchd.ctl"
        self.vswitchd = subprocess.Popen([*command, log, control], env=environment, stdin=subprocess.DEVNULL)

    def kill(self) -> None:
        if self.vswitchd is not None:
            self.vswitchd.kill()
            self.vswitchd.wait(10)
            self.vswitchd = None
