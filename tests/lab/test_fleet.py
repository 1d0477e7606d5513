"""The lab itself: it comes up whole, heals, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from handoff_lab.errors import LabError
from handoff_lab.fleet import Fleet
from handoff_lab.guest import Guests
from handoff_lab.main import main
from handoff_lab.netns import NetNamespace
from handoff_lab.node import all_marked, nodes
from handoff_lab.state import Lab

pytestmark = pytest.mark.lab


def pids(fleet: Fleet) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for node in fleet.status():
        found[node.name] = node.pid
        found |= {f"{node.name}/{name}": pid for name, pid in node.daemons.items()}
    return found


def network_namespaces(pids: list[int]) -> set[str]:
    return {str(Path(f"/proc/{pid}/ns/net").readlink()) for pid in pids}


def namespaces_in_use() -> set[str]:
    found = set()
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                found.add(str((process / "ns/net").readlink()))
            except OSError:
                continue
    return found


def interfaces() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


def assert_nothing_left(lab: Lab) -> None:
    assert all_marked(lab) == []
    assert not lab.directory.exists()
    assert str(lab.directory) not in Path("/proc/self/mountinfo").read_text()
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                command = (process / "cmdline").read_text()
            except OSError:
                continue
            # The test's own command line may name the directory, a process of the lab's must not be left.
            assert str(lab.directory) not in command or int(process.name) == os.getpid(), command


def test_up_is_whole_and_leaves_what_runs_alone(fleet: Fleet) -> None:
    before = pids(fleet)
    assert [name for name, pid in before.items() if pid is None] == []
    fleet.up()
    assert pids(fleet) == before


def test_down_leaves_nothing_behind(spare: Fleet) -> None:
    before = interfaces()
    spare.up(hosts=2, controllers=1, agents=False)
    Guests(spare).create("g1", "h1", memory_mib=128, wait=False)
    spaces = network_namespaces(list(nodes(spare.lab).values()))
    assert len(spaces) == 6  # two hosts, a controller, an etcd member, the gateway, the fabric
    spare.down()
    assert_nothing_left(spare.lab)
    assert not spaces & namespaces_in_use()
    assert interfaces() == before
    spare.down()


@pytest.mark.parametrize("after_s", [0.15, 0.4, 0.7, 1.2])
def test_down_after_up_was_killed(spare: Fleet, after_s: float) -> None:
    command = [sys.executable, "-m", "handoff_lab.main", "up", "--hosts", "2", "--no-agents"]
    environment = {**os.environ, "HANDOFF_LAB_DIR": str(spare.lab.directory)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as up:
        time.sleep(after_s)  # the moment of the crash is the test's parameter
        up.kill()
    spare.down()
    assert_nothing_left(spare.lab)


def test_down_after_everything_was_killed(spare: Fleet) -> None:
    spare.up(hosts=2, controllers=1, agents=False)
    for pid in nodes(spare.lab).values():
        os.kill(pid, signal.SIGKILL)
    spare.down()
    assert_nothing_left(spare.lab)


def test_down_without_its_files(spare: Fleet) -> None:
    spare.up(hosts=1, controllers=1, agents=False)
    (spare.lab.directory / "lab.json").unlink()
    spare.down()
    assert_nothing_left(spare.lab)


def test_up_heals_and_grows(spare: Fleet) -> None:
    spare.up(hosts=2, controllers=1, agents=False)
    before = pids(spare)
    spare.daemon("h1", "libvirtd-a").signal(signal.SIGKILL)
    spare.daemon("h1", "ovs-vswitchd").signal(signal.SIGKILL)
    spare.daemon("etcd1", "etcd").signal(signal.SIGKILL)
    spare.power_off("h2")
    spare.up(hosts=3)
    after = pids(spare)
    ours = ("agent", "controller")
    assert [name for name, pid in after.items() if pid is None and not name.endswith(ours)] == []
    assert after["h1"] == before["h1"]
    assert after["h1/libvirtd-b"] == before["h1/libvirtd-b"]
    assert after["h2"] != before["h2"]
    assert "h3" in after
    assert_hosts_reach_each_other(spare)


def test_up_mends_a_lost_fabric(spare: Fleet) -> None:
    spare.up(hosts=2, controllers=1, agents=False)
    spare.fabric.node.kill()
    spare.up()
    assert_hosts_reach_each_other(spare)


def assert_hosts_reach_each_other(fleet: Fleet) -> None:
    for net in ("10.10.0", "10.20.0"):
        assert transfer(fleet, f"{net}.2", 0.1) > 0


def transfer(fleet: Fleet, address: str, seconds: float) -> float:
    """Sends from h1 to h2 for some time; MiB per second that arrived."""
    with NetNamespace.of(fleet.node("h1")) as here, NetNamespace.of(fleet.node("h2")) as there:
        listener, sender = there.socket(), here.socket()
    got = 0

    def receive() -> None:
        nonlocal got
        session, _ = listener.accept()
        with session:
            while data := session.recv(1 << 16):
                got += len(data)

    with listener, sender:
        listener.bind((address, 5555))
        listener.listen(1)
        receiver = threading.Thread(target=receive)
        receiver.start()
        sender.settimeout(10)
        sender.connect((address, 5555))
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            sender.sendall(bytes(1 << 16))
        sender.close()
        receiver.join()
        return got / (1 << 20) / (time.monotonic() - began)


def test_the_link_rate_limits_the_overlay_alone(fleet: Fleet) -> None:
    assert transfer(fleet, "10.20.0.2", 1) > 30
    fleet.set_rate("h2", "80mbit")
    try:
        assert {node.name: node.link.rate for node in fleet.status() if node.link}["h2"] == "80mbit"
        assert 4 < transfer(fleet, "10.20.0.2", 2) < 11
        assert transfer(fleet, "10.10.0.2", 1) > 30
    finally:
        fleet.set_rate("h2", "none")
    assert transfer(fleet, "10.20.0.2", 1) > 30


def test_a_power_off_ends_the_guests_and_nothing_else(spare: Fleet) -> None:
    spare.up(hosts=2, controllers=1, agents=False)
    guests = Guests(spare)
    guest = guests.create("g1", "h1", memory_mib=128, wait=False)
    qemu = guests.qemu_pid(guest.name)
    spare.power_off("h1")
    assert not Path(f"/proc/{qemu}").exists()
    assert spare.node("h2").pid() is not None
    spare.up()
    assert [seen.state for seen in guests.find("g1")] == ["shut off"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["exec", "h9", "--", "true"], "no node h9"),
        (["guest", "create", "g1", "--host", "h4"], "up --hosts"),
        (["guest", "create", "G_1", "--host", "h1"], "no guest name"),
        (["guest", "create", "g1", "--host", "h1", "--disk", "size=huge"], "size is a number"),
        (["guest", "delete", "ghost"], "there is no guest ghost"),
        (["console", "ghost"], "there is no guest ghost"),
        (["link", "h1", "--rate", "fast"], "is not a rate"),
        (["kill", "h1", "cron"], "has no daemon cron"),
        (["up", "--hosts", "9"], "1 to 5"),
        (["up", "--etcd", "3"], "handoff-lab down"),
    ],
)
def test_errors_say_what_to_do(fleet: Fleet, arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(main, arguments, env={"HANDOFF_LAB_DIR": str(fleet.lab.directory)})
    assert result.exit_code == 1
    assert says in result.output
    assert fleet.lab.guests() == []


def test_no_lab_is_an_error(spare: Fleet) -> None:
    result = CliRunner().invoke(main, ["status"], env={"HANDOFF_LAB_DIR": str(spare.lab.directory)})
    assert result.exit_code == 1
    assert "handoff-lab up" in result.output


def test_a_directory_that_is_too_long_is_refused() -> None:
    result = CliRunner().invoke(main, ["up"], env={"HANDOFF_LAB_DIR": "/var/lib/" + 60 * "x"})
    assert result.exit_code == 1
    assert "HANDOFF_LAB_DIR" in result.output


def test_unknown_hosts_are_refused(fleet: Fleet) -> None:
    with pytest.raises(LabError, match="not a host"):
        fleet.power_off("fabric")


def test_agents_and_controllers_are_restarted_and_frozen(fleet: Fleet) -> None:
    before = pids(fleet)
    fleet.restart("h1", "agent")
    fleet.daemon("ctl1", "controller").signal(signal.SIGKILL)
    fleet.daemon("h2", "libvirtd-b").signal(signal.SIGSTOP)
    fleet.daemon("h2", "libvirtd-b").signal(signal.SIGCONT)
    assert pids(fleet)["ctl1/controller"] is None
    fleet.up()
    after = pids(fleet)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"h1/agent", "ctl1/controller"}
    assert None not in after.values()
