"""The command handoff-lab."""

import dataclasses
import json
import os
import shlex
import signal
import sys
from functools import partial
from typing import NoReturn

import click
from rich.console import Console
from rich.table import Table

from handoff_lab import guest as guests_module
from handoff_lab.errors import LabError
from handoff_lab.fleet import Fleet, require_root
from handoff_lab.guest import DEFAULT_DISK, DEFAULT_NETWORK, DISK_SYNTAX, Guests
from handoff_lab.host import HOST_TYPES
from handoff_lab.networks import NAMES
from handoff_lab.node import base_environment
from handoff_lab.parallel import in_parallel
from handoff_lab.state import Lab

output_option = click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", help="How to print."
)


class LabGroup(click.Group):
    """Prints a LabError as one line, and exits with 1."""

    def invoke(self, ctx: click.Context) -> object:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except LabError as error:
            raise click.ClickException(str(error)) from None


def become(command: list[str], environment: dict[str, str]) -> NoReturn:
    """Turns this process into a command inside of a node."""
    terminal = {"TERM": os.environ.get("TERM", "dumb")}
    os.execvpe(command[0], command, {**base_environment(), **terminal, **environment})  # noqa: S606


def signal_named(name: str) -> signal.Signals:
    """KILL or SIGKILL, in any case."""
    try:
        return signal.Signals[f"SIG{name.upper().removeprefix('SIG')}"]
    except KeyError:
        raise click.UsageError(f"there is no signal {name}") from None


@click.group(cls=LabGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def main(context: click.Context) -> None:
    """A fleet of hypervisors on one machine, all parts real: libvirt, QEMU, Open vSwitch, etcd, agents, controllers."""
    require_root()
    context.obj = Fleet(Lab.from_environment())


@main.command()
@click.option("--hosts", type=int, help="Hypervisors, 1 to 5; 3 in a new lab.")
@click.option("--controllers", type=int, help="Controllers; 2 in a new lab.")
@click.option("--etcd", type=int, help="Members of etcd, 1 or 3; 1 in a new lab.")
@click.option("--host-memory", type=int, metavar="MIB", help="Memory of each host for guests; 2048 in a new lab.")
@click.option("--agents/--no-agents", default=None, help="Whether to run agents and controllers.")
@click.pass_obj
def up(
    fleet: Fleet,
    hosts: int | None,
    controllers: int | None,
    etcd: int | None,
    host_memory: int | None,
    agents: bool | None,
) -> None:
    """Start the lab, or whatever of it is missing; with more hosts or controllers than it has, add them."""
    config = fleet.up(hosts, controllers, etcd, host_memory, agents)
    click.echo(
        f"{config.hosts} hosts, {config.controllers} controllers, {config.etcd} etcd in {fleet.lab.directory}", err=True
    )


@main.command()
@click.pass_obj
def down(fleet: Fleet) -> None:
    """End the lab and remove all of it, guests and disks too."""
    fleet.down()


@main.command()
@output_option
@click.pass_obj
def status(fleet: Fleet, output: str) -> None:
    """Show what runs."""
    found = fleet.status()
    if output == "json":
        click.echo(json.dumps([dataclasses.asdict(node) for node in found], indent=2))
        return
    table = Table("node", "pid", "daemons", "link", box=None)
    for node in found:
        daemons = " ".join(name if pid else f"[red]{name} (down)[/]" for name, pid in node.daemons.items())
        link = ""
        if node.link is not None:
            cut = [
                n for n, is_up in (("mgmt", node.link.management_up), ("overlay", node.link.overlay_up)) if not is_up
            ]
            link = f"[red]cut: {', '.join(cut)}[/]" if cut else (node.link.rate or "unlimited")
        table.add_row(node.name, str(node.pid or "[red]down[/]"), daemons, link)
    Console().print(table)


@main.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("node")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def exec_command(fleet: Fleet, node: str, command: tuple[str, ...]) -> None:
    """Run COMMAND (by default a shell) inside of a node."""
    words = command[1:] if command[:1] == ("--",) else command
    become(fleet.node(node).command(words or ("bash",)), fleet.environment())


@main.command()
@click.argument("host")
@click.option("--rate", help="Limit of the overlay link, both ways: 1gbit, 200mbit, none.")
@click.option("--down/--up", "cut", default=None, help="Cut or mend the host's cables.")
@click.option("--mgmt", is_flag=True, help="Only the management cable.")
@click.option("--overlay", is_flag=True, help="Only the overlay cable.")
@click.pass_obj
def link(fleet: Fleet, host: str, rate: str | None, cut: bool | None, mgmt: bool, overlay: bool) -> None:
    """Set the rate of a host's overlay link, or cut and mend its cables."""
    if rate is None and cut is None:
        raise click.UsageError("say --rate, --down or --up")
    if rate is not None:
        fleet.set_rate(host, rate)
    if cut is not None:
        both = mgmt == overlay
        fleet.set_link(host, not cut, mgmt or both, overlay or both)


@main.command("host-type")
@click.argument("host")
@click.argument("kind", metavar="TYPE", type=click.Choice(list(HOST_TYPES)))
@click.pass_obj
def host_type(fleet: Fleet, host: str, kind: str) -> None:
    """Say what kind of host one is: where local disks go there, and in what format. Its agent is restarted."""
    fleet.set_type(host, kind)


@main.command()
@click.argument("node")
@click.argument("daemon")
@click.pass_obj
def restart(fleet: Fleet, node: str, daemon: str) -> None:
    """Restart a daemon: agent, libvirtd-a, libvirtd-b, ovsdb-server, ovs-vswitchd, controller, etcd."""
    fleet.restart(node, daemon)


@main.command()
@click.argument("node")
@click.argument("daemon")
@click.option("--signal", "name", default="KILL", help="KILL, TERM, STOP, CONT…")
@click.pass_obj
def kill(fleet: Fleet, node: str, daemon: str, name: str) -> None:
    """Signal a daemon; nothing starts it again before `up` or `restart`."""
    fleet.daemon(node, daemon).signal(signal_named(name))


@main.command()
@click.argument("host")
@click.pass_obj
def poweroff(fleet: Fleet, host: str) -> None:
    """Cut a host's power; `up` starts it again, without its guests."""
    fleet.power_off(host)


@main.command()
@click.pass_obj
def env(fleet: Fleet) -> None:
    """Print what a shell needs: eval "$(handoff-lab env)"."""
    for name, value in fleet.environment().items():
        click.echo(f"export {name}={shlex.quote(value)}")


@main.command()
@click.argument("name")
@click.pass_obj
def console(fleet: Fleet, name: str) -> None:
    """Attach to a guest's console; Ctrl-] leaves it. What it said is in shared/NAME.console."""
    guests = Guests(fleet)
    host = guests.running_on(name)
    slot = next(seen.slot for seen in guests.find(name) if seen.host == host.name and seen.state != "shut off")
    uri = f"qemu+unix:///system?socket=/run/handoff/slots/{slot}/libvirt-sock"
    become(host.node.command(["virsh", "-c", uri, "console", "--force", name]), {})


@main.group()
def guest() -> None:
    """Create, list and delete guests."""


@guest.command()
@click.argument("names", nargs=-1, required=True)
@click.option("--host", required=True, help="Where it starts.")
@click.option("--memory", type=click.IntRange(min=128), default=256, show_default=True, metavar="MIB")
@click.option("--vcpus", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--disk", "disks", multiple=True, help=f"Repeatable: {DISK_SYNTAX}; or `none`.")
@click.option("--network", type=click.Choice(NAMES), default=DEFAULT_NETWORK, show_default=True)
@click.option("--release", default="", metavar="NAME", help="QEMU build, as `handoff hosts` names it.")
@click.option("--machine", default="", metavar="TYPE", help="Machine type.  [default: the newest that the build has]")
@click.option("--shareable/--no-shareable", default=True, help="Whether its memory can change its QEMU without a copy.")
@click.option("--no-wait", is_flag=True, help="Do not wait until it has booted.")
@click.pass_obj
def create(
    fleet: Fleet,
    names: tuple[str, ...],
    host: str,
    memory: int,
    vcpus: int,
    disks: tuple[str, ...],
    network: str,
    release: str,
    machine: str,
    shareable: bool,
    no_wait: bool,
) -> None:
    """Create guests and wait until they have booted; one that exists stays as it is."""
    wanted = () if disks == ("none",) else disks or (DEFAULT_DISK,)
    guests = Guests(fleet)
    make = partial(
        guests.create,
        host=host,
        memory_mib=memory,
        vcpus=vcpus,
        disks=wanted,
        network=network,
        wait=not no_wait,
        release=release,
        machine=machine,
        shareable=shareable,
    )
    made = in_parallel([partial(make, name) for name in names])
    for record in made:
        click.echo(f"{record.name} {record.uuid} {record.ip if record.network != 'none' else '-'} on {host}")


@guest.command("list")
@output_option
@click.pass_obj
def list_guests(fleet: Fleet, output: str) -> None:
    """List the lab's guests and where they are."""
    guests = Guests(fleet)
    seen = guests.sightings()
    rows = [guests_module.as_json(g, [s for s in seen if s.guest == g.name]) for g in fleet.lab.guests()]
    if output == "json":
        click.echo(json.dumps(rows, indent=2))
        return
    table = Table("guest", "host", "slot", "state", "address", "memory", "disks", box=None)
    for row, record in zip(rows, fleet.lab.guests(), strict=True):
        disks = " ".join(f"{d.target}:{d.format}:{d.place}" for d in record.disks)
        cells = (row["name"], row["host"] or "-", row["slot"] or "-", row["state"], record.ip)
        table.add_row(*map(str, cells), f"{record.memory_mib} MiB", disks)
    Console().print(table)


@guest.command("kill")
@click.argument("name")
@click.option("--signal", "signal_name", default="KILL", help="KILL, STOP, CONT…")
@click.pass_obj
def kill_guest(fleet: Fleet, name: str, signal_name: str) -> None:
    """Signal a guest's QEMU."""
    fleet.lab.guest(name)
    Guests(fleet).signal(name, signal_named(signal_name))


@guest.command()
@click.argument("names", nargs=-1, required=True)
@click.pass_obj
def delete(fleet: Fleet, names: tuple[str, ...]) -> None:
    """End guests wherever they are, and remove their disks."""
    for name in names:
        fleet.lab.guest(name)
        Guests(fleet).delete(name)


if __name__ == "__main__":
    sys.exit(main())
