"""Tables of hosts and guests."""

from collections.abc import Iterable, Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.text import Text

from handoff.agent.v1.host_pb2 import Emulator
from handoff.controller.v1.guests_pb2 import Guest
from handoff.controller.v1.hosts_pb2 import Host, HostState
from handoff_cli.render.parts import loss_state, moment, place, state_text, table
from handoff_cli.states import domain_state, host_state
from handoff_cli.units import format_age, format_bytes, format_date

# In a narrower terminal the bar and the agents' addresses are left out.
WIDE = 110
BAR_CELLS = 10


def hosts_table(hosts: Iterable[Host], width: int, now: datetime) -> RenderableType:
    """One line a host; below it what is wrong with those that are not UP."""
    hosts = tuple(hosts)
    if not hosts:
        return Text("No hosts: the controller's configuration names none.")
    wide = width >= WIDE
    columns = ("HOST", "STATE", "GUESTS", "MEMORY FREE", "CPUS", "QEMU", "LIBVIRT", "AGENT")
    made = table(columns if wide else columns[:-1], right=("GUESTS", "CPUS"), fold=("HOST", "QEMU", "AGENT"))
    for host in hosts:
        detail = host.detail
        cells: list[RenderableType] = [
            host.name,
            state_text(host_state(host.state)),
            str(host.guests),
            _memory(detail.memory_free_bytes, detail.memory_bytes, bar=wide),
            str(detail.cpus) if detail.cpus else "–",
            ", ".join(map(_build, detail.emulators)) or "–",
            _distinct(slot.libvirt_version for slot in detail.slots),
        ]
        made.add_row(*cells, *([host.agent_address] if wide else []))
    notes = [_host_note(host, now) for host in hosts if host.state != HostState.HOST_STATE_UP]
    notes += [
        Text.assemble((host.name, "bold"), ": ", ("decide: ", "bold red"), text)
        for host in hosts
        for text in host.problems
    ]
    return Group(made, *([Text()] if notes else []), *notes)


def _host_note(host: Host, now: datetime) -> Text:
    name = host_state(host.state)
    note = Text.assemble((host.name, "bold"), " is ", state_text(name))
    note.append(f": {host.message or 'no reason known'}")
    if host.HasField("seen_time"):
        note.append(f" (last heard of {format_age((now - moment(host.seen_time)).total_seconds())} ago)")
    return note


def _memory(free: int, total: int, *, bar: bool) -> Text:
    """ "23.0 of 64.0 GiB", free of all; with a bar of what is taken where there is room."""
    if not total:
        return Text("–")
    free_text, total_text = format_bytes(free), format_bytes(total)
    unit = total_text[total_text.index(" ") :]
    text = Text(f"{free_text.removesuffix(unit)} of {total_text}")
    if bar:
        taken = min(1.0, max(0.0, 1 - free / total))
        style = "green" if taken < 0.75 else "yellow" if taken < 0.95 else "red"
        filled = round(taken * BAR_CELLS)
        text.append("  ").append("█" * filled, style).append("░" * (BAR_CELLS - filled), "dim")
        text.append(f" {100 * taken:3.0f} % used", "dim")
    return text


def _build(emulator: Emulator) -> str:
    """ "10.0-rebuilt (10.0.2)"; only the release where that is also its name, or it has none."""
    if emulator.name in ("", emulator.release):
        return emulator.release
    return f"{emulator.name} ({emulator.release})"


def _distinct(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(name for name in names if name)) or "–"


def guests_table(guests: Sequence[Guest]) -> RenderableType:
    """One line a guest; below it what is wrong with some of them."""
    if not guests:
        return Text("No guests.")
    made = table(
        ("GUEST", "HOST", "STATE", "MEMORY", "VCPUS", "QEMU", "MIGRATION"),
        right=("MEMORY", "VCPUS"),
        fold=("GUEST", "HOST"),
    )
    for guest in guests:
        domain = guest.domain
        known = guest.HasField("domain")
        made.add_row(
            guest.name,
            place(guest.owner),
            state_text(loss_state(guest.loss) if guest.HasField("loss") else domain_state(domain.state)),
            format_bytes(domain.memory_bytes) if known else "–",
            str(domain.vcpus) if known else "–",
            _build(Emulator(name=domain.emulator_name, release=domain.qemu_release)) or "–",
            guest.active_migration or "–",
        )
    notes = [_conflict_note(guest) for guest in guests if guest.conflicts]
    notes += [_loss_note(guest) for guest in guests if guest.HasField("loss")]
    notes += [
        Text.assemble((guest.name, "bold"), ": ", ("needs a decision: ", "bold red"), guest.needs_decision)
        for guest in guests
        if guest.needs_decision
    ]
    return Group(made, *([Text()] if notes else []), *notes)


def _loss_note(guest: Guest) -> Text:
    loss = guest.loss
    note = Text.assemble((guest.name, "bold"), " is ", state_text(loss_state(loss)), f" on {loss.host}")
    if loss.HasField("time"):
        note.append(f" since {format_date(moment(loss.time))}")
    return note.append(f": {loss.reason}")


def _conflict_note(guest: Guest) -> Text:
    return Text.assemble(
        ("conflict: ", "bold red"),
        f"{guest.name} ({guest.uuid}) belongs to {place(guest.owner)}, but there is a copy on "
        f"{', '.join(guest.conflicts)} too. Find out which one is right and destroy the other",
    )
