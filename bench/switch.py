"""`make bench-switch`: how long a guest is away when it moves, by itself and by its network, for four ways to make the
frames follow it (see ways.py). In turns, so that all meet the same machine.

Of each move are kept:

    pause_ms          from the first to the last tick that the guest missed, of one each millisecond, on our clock
    still_ms          of that, how long its own clock stood still, by the quickest echoes before and after
    stop_resume_ms    from STOP at the source to RESUME at the destination, by both QEMUs' own time stamps
    host, gateway     a datagram every millisecond, from a third host and from outside of the fabric: the longest time
                      without an answer, that less the pause, lost, duplicated, out of order, and answers that waited
    ping, tcp         of both as well (gateway_ping, gateway_tcp): pings every 10 ms, and a session that must not miss a
                      byte
    parts_ms          where the gap went

The parts follow each other, from the last answer of the source to the first of the destination:

    unheard           frames are sent on already, the guest still runs (less: the last answers arrive after STOP)
    stopping          QEMU's: STOP until it has come to its last pass
    continuing        ours: the agent hears of it, and tells QEMU to send the rest
    last_memory       QEMU's: until the source knows that the destination has loaded everything (return path)
    commit            ours: the agent hears of it and tells the leader, who writes it into etcd
    activation        ours: the leader tells the destination's agent, and that QEMU, to run the guest
    catching_up       the guest's: RESUME until it ticks on time again; without KVM, QEMU translates all its code anew
    first_answer      from then until the first answer arrives at the third host (less: it arrived before)
"""

import asyncio
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import click
import grpc
import grpc.aio
from rich.console import Console
from rich.table import Table

from bench.client import Client
from bench.pauses import PauseWatch, watch_pauses
from bench.ways import Site, Way
from handoff.controller.v1.guests_pb2 import Guest
from handoff.controller.v1.migrations_pb2 import Migration
from handoff_common.channel import open_channel
from handoff_controller.machine import State
from handoff_lab import gateway
from handoff_lab.fleet import Fleet
from handoff_lab.guest import Guests
from handoff_lab.networks import RED, TENANT, network_named
from handoff_lab.probe import GuestControl, PingProbe, Stall, TcpResult, TcpSession, UdpProbe, UdpResult
from handoff_lab.state import DEFAULT_PREFIX, GuestRecord, Lab

REPORT = Path("out/bench/switch.json")
LAB = Path("/var/tmp/handoff-bench-sw")
MEMORY_MIB = 128
SOURCE, DESTINATION, OBSERVER = "h1", "h2", "h3"
PING_EVERY_US = 10_000
DEADLINE_S = 120.0
# The quickest answers in this time before and after the gap tell the pause.
BEFORE_S, AFTER_S = 0.6, 0.6
SETTLE_S = 0.5
MOST_GAP_MS, MOST_BESIDE_PAUSE_MS = 100.0, 10.0
PARTS = (*("unheard", "stopping", "continuing", "last_memory", "commit", "activation", "catching_up", "first_answer"),)
OURS = ("continuing", "commit", "activation")
# Missed ticks that are no further apart are of one pause.
ON_TIME_MS = 5.0
INEXACT_MS = 2.0


@dataclass(frozen=True, slots=True)
class View:
    """What one probe saw of a move."""

    gap_ms: float
    gap_less_pause_ms: float
    gap_less_still_ms: float
    sent: int
    lost: int
    duplicated: int
    late: int
    waited: int
    lost_after_stop_ms: tuple[int, ...] = ()
    """When each that was lost was sent."""

    @classmethod
    def of(cls, seen: UdpResult, pause_ms: float, still_ms: float, stop_s: float) -> "View":
        """Rounded. `stop_s`: when QEMU stopped the guest, on the wall clock."""
        gap_ms = seen.longest_gap_ms
        beside = (round(gap_ms - pause_ms, 1), round(gap_ms - still_ms, 1))
        lost = tuple(round(1000 * (sent_s - stop_s)) for sent_s in seen.unanswered)
        return cls(round(gap_ms, 1), *beside, seen.sent, seen.lost, seen.duplicated, seen.late, seen.waited, lost)


@dataclass(frozen=True, slots=True)
class Session:
    """What a TCP session saw of a move."""

    silence_ms: float
    survived: bool

    @classmethod
    def of(cls, seen: TcpResult) -> "Session":
        """Rounded."""
        return cls(round(seen.longest_silence_ms, 1), seen.survived)


@dataclass(frozen=True, slots=True)
class Reading:
    """One move."""

    way: str
    source: str
    destination: str
    total_ms: float
    pause_ms: float
    still_ms: float
    inexact_ms: float
    stop_resume_ms: float
    host: View
    gateway: View
    ping: View
    gateway_ping: View
    tcp: Session
    gateway_tcp: Session
    parts_ms: dict[str, float]
    by_record_ms: dict[str, float]


class Bench:
    """Two guests that go back and forth: one in a network that the agents keep, one where the site does."""

    def __init__(self, fleet: Fleet, guests: dict[Way, GuestRecord], channel: grpc.aio.Channel) -> None:
        self._fleet = fleet
        self._guests_of = guests
        self._at = dict.fromkeys((guest.name for guest in guests.values()), SOURCE)
        self._client = Client(channel, DEADLINE_S)
        self.readings: list[Reading] = []

    async def run(self, ways: tuple[Way, ...], rounds: int, pauses: dict[str, PauseWatch]) -> None:
        """One round more than that, which warms up."""
        for number in range(rounds + 1):
            for way in ways:
                reading = await self._measure(way, pauses[self._guests_of[way].name])
                click.echo(_line(reading) + ("  (warm-up, not counted)" if number == 0 else ""))
                if number:
                    self.readings.append(reading)

    async def _measure(self, way: Way, pauses: PauseWatch) -> Reading:
        guest = self._guests_of[way]
        source = self._at[guest.name]
        destination = DESTINATION if source == SOURCE else SOURCE
        await self._client.settled(guest.uuid, partial(_is_on, source), SETTLE_S)
        site = Site(self._fleet, guest)
        await asyncio.to_thread(site.prepare, way, source, destination)
        pauses.clear()
        inside = GuestControl(self._fleet.node(OBSERVER), guest.ip)
        await inside.ticks(reset=True)
        lab, observer, gw = self._fleet.lab, self._fleet.node(OBSERVER), self._fleet.node(gateway.NAME)
        network = network_named(guest.network)
        assert network is not None
        interface = network.interface
        async with (
            UdpProbe(lab, observer, guest.ip, interface=interface) as from_host,
            UdpProbe(lab, gw, guest.ip, interface=interface) as from_outside,
            PingProbe(lab, observer, guest.ip, PING_EVERY_US, interface=interface) as ping,
            PingProbe(lab, gw, guest.ip, PING_EVERY_US, interface=interface) as ping_from_outside,
            TcpSession(observer, guest.ip, interface=interface) as tcp,
            TcpSession(gw, guest.ip, interface=interface) as tcp_from_outside,
        ):
            await asyncio.sleep(BEFORE_S)
            began = time.monotonic()
            done = await self._client.done(await self._client.create_move(guest.name, destination))
            total_ms = 1000 * (time.monotonic() - began)
            await asyncio.to_thread(site.follow, way, destination)
            await asyncio.sleep(AFTER_S)
            probes = (from_host, from_outside, ping, ping_from_outside)
            host_saw, gateway_saw, *pings_saw = await asyncio.gather(*(probe.stop() for probe in probes))
            sessions_saw = await asyncio.gather(tcp.close(), tcp_from_outside.close())
        stalls = await inside.stalls()
        self._at[guest.name] = destination
        ends = await asyncio.to_thread(pauses.ends, source, destination)
        views = (host_saw.standstill(*ends), gateway_saw.standstill(*ends))
        still = min((view for view in views if view is not None), key=lambda view: view.inexact_ms)
        pause_ms = still.length_ms + missed_ticks_ms(stalls, still.guest_ns)
        ping_view, gateway_ping_view = (View.of(seen, pause_ms, still.length_ms, ends[0]) for seen in pings_saw)
        session, gateway_session = map(Session.of, sessions_saw)
        return Reading(
            way=way.value,
            source=source,
            destination=destination,
            total_ms=round(total_ms, 1),
            pause_ms=round(pause_ms, 1),
            still_ms=round(still.length_ms, 1),
            inexact_ms=round(still.inexact_ms, 1),
            stop_resume_ms=round(1000 * (ends[1] - ends[0]), 1),
            host=View.of(host_saw, pause_ms, still.length_ms, ends[0]),
            gateway=View.of(gateway_saw, pause_ms, still.length_ms, ends[0]),
            ping=ping_view,
            gateway_ping=gateway_ping_view,
            tcp=session,
            gateway_tcp=gateway_session,
            parts_ms=_parts(host_saw, ends, pause_ms - still.length_ms, pauses, source, done),
            by_record_ms={
                "paused_to_held": round(done.outcome.paused_to_held_ms, 1),
                "held_to_committed": round(done.outcome.held_to_committed_ms, 1),
                "committed_to_running": round(done.outcome.committed_to_running_ms, 1),
            },
        )


def _is_on(host: str, guest: Guest) -> bool:
    return guest.owner.host == host


def _parts(
    seen: UdpResult, ends: tuple[float, float], catching_up_ms: float, pauses: PauseWatch, source: str, done: Migration
) -> dict[str, float]:
    """See above; empty where something was not announced, as by a QEMU that is too old."""
    stopped_s, resumed_s = ends
    announced = [pauses.last(source, f"MIGRATION {state}") for state in ("pre-switchover", "device", "completed")]
    committed = next((change.time for change in done.timeline if change.state == State.COMMITTED.value), None)
    heard = [moment for moment in announced if moment is not None]
    if len(heard) < len(announced) or committed is None:
        return {}
    gap = seen.longest_gap
    moments = (
        *(gap.began_at_s, stopped_s, *heard, committed.ToNanoseconds() / 1e9, resumed_s),
        resumed_s + catching_up_ms / 1000,
        gap.began_at_s + gap.length_ms / 1000,
    )
    return {name: round(1000 * (end - begin), 1) for name, (begin, end) in zip(PARTS, pairwise(moments), strict=True)}


def missed_ticks_ms(stalls: list[Stall], stopped_ns: int) -> float:
    """How long the guest missed ticks around the moment at which its clock stood still, by that clock: from the last
    tick before it until those of ON_TIME_MS were on time. 0 when it missed none but those of its standstill.
    """
    near_ns, apart_ns = int(INEXACT_MS * 1e6), int(ON_TIME_MS * 1e6)
    began_ns = ended_ns = 0
    for stall in sorted(stalls, key=lambda each: each.began_ns):
        end_ns = stall.began_ns + stall.length_ns
        if not ended_ns:
            if stall.began_ns <= stopped_ns + near_ns and end_ns >= stopped_ns - near_ns:
                began_ns, ended_ns = stall.began_ns, end_ns
        elif stall.began_ns <= ended_ns + apart_ns:
            ended_ns = end_ns
    return (ended_ns - began_ns) / 1e6


def _line(reading: Reading) -> str:
    def view(name: str, seen: View) -> str:
        return f"{name} {seen.gap_ms:6.1f} ms, lost {seen.lost}, twice {seen.duplicated}"

    return (
        f"{reading.way:9} {reading.source}→{reading.destination} pause {reading.pause_ms:6.1f}"
        f" (clock {reading.still_ms:6.1f} ±{reading.inexact_ms:.1f}, STOP to RESUME {reading.stop_resume_ms:6.1f});"
        f" {view('third host', reading.host)}; {view('gateway', reading.gateway)}"
    )


def spread(values: list[float]) -> dict[str, float]:
    """Median, 95th percentile (nearest rank) and maximum."""
    ordered = sorted(values)
    rank = -(-95 * len(ordered) // 100)
    found = {"median": statistics.median(ordered), "p95": ordered[rank - 1], "max": ordered[-1]}
    return {name: round(value, 1) for name, value in found.items()}


def summary(readings: list[Reading]) -> dict[str, object]:
    """Of one way."""

    def figures(views: list[View]) -> dict[str, object]:
        return {
            "gap_ms": spread([view.gap_ms for view in views]),
            "gap_less_pause_ms": spread([view.gap_less_pause_ms for view in views]),
            "gap_less_still_ms": spread([view.gap_less_still_ms for view in views]),
            "lost": spread([view.lost for view in views]),
            "duplicated": spread([view.duplicated for view in views]),
            "late": spread([view.late for view in views]),
            "waited": spread([view.waited for view in views]),
        }

    def sessions(seen: list[Session]) -> dict[str, object]:
        return {
            "silence_ms": spread([session.silence_ms for session in seen]),
            "survived": sum(session.survived for session in seen),
        }

    told = [reading.parts_ms for reading in readings if reading.parts_ms]
    return {
        "moves": len(readings),
        "pause_ms": spread([reading.pause_ms for reading in readings]),
        "still_ms": spread([reading.still_ms for reading in readings]),
        "stop_resume_ms": spread([reading.stop_resume_ms for reading in readings]),
        "total_ms": spread([reading.total_ms for reading in readings]),
        "third_host": figures([reading.host for reading in readings]),
        "gateway": figures([reading.gateway for reading in readings]),
        "ping": figures([reading.ping for reading in readings]),
        "gateway_ping": figures([reading.gateway_ping for reading in readings]),
        "tcp": sessions([reading.tcp for reading in readings]),
        "gateway_tcp": sessions([reading.gateway_tcp for reading in readings]),
        "parts_ms": {name: spread([parts[name] for parts in told]) for name in PARTS} if told else {},
        "ours_ms": spread([sum(parts[name] for name in OURS) for parts in told]) if told else {},
        "by_record_ms": {
            name: spread([reading.by_record_ms[name] for reading in readings]) for name in readings[0].by_record_ms
        },
    }


def targets(ours: list[Reading]) -> dict[str, bool]:
    """Whether our way is what was asked for."""
    met = {}
    for name, views, pings, sessions in (
        ("third host", [each.host for each in ours], [each.ping for each in ours], [each.tcp for each in ours]),
        (
            "gateway",
            [each.gateway for each in ours],
            [each.gateway_ping for each in ours],
            [each.gateway_tcp for each in ours],
        ),
    ):
        beside = statistics.median(view.gap_less_pause_ms for view in views)
        gap = statistics.median(view.gap_ms for view in views)
        met[f"{name}: gap less pause ≤ {MOST_BESIDE_PAUSE_MS:g} ms at the median"] = beside <= MOST_BESIDE_PAUSE_MS
        met[f"{name}: gap < {MOST_GAP_MS:g} ms at the median"] = gap < MOST_GAP_MS
        met[f"{name}: no frame twice"] = not any(view.duplicated for view in views)
        met[f"{name}: no frame lost"] = not any(view.lost for view in views)
        met[f"{name}: no ping lost or answered twice"] = not any(view.lost or view.duplicated for view in pings)
        met[f"{name}: every TCP session survived"] = all(session.survived for session in sessions)
    return met


def tables(by_way: dict[str, list[Reading]]) -> list[Table]:
    """For people: median / p95 / max."""

    def cell(values: list[float], digits: int = 1) -> str:
        return " / ".join(f"{value:.{digits}f}" for value in spread(values).values())

    gaps = Table("way", box=None, title="ms: median / p95 / max", title_justify="left")
    for column in ("pause", "clock stood still", "gap, third host", "less pause", "gap, gateway", "less pause"):
        gaps.add_column(column, justify="right")
    packets = Table("way", box=None, title="datagrams a move: median / p95 / max", title_justify="left")
    for column in ("lost, third host", "lost, gateway", "twice, third host", "twice, gateway"):
        packets.add_column(column, justify="right")
    for column in ("pings lost, third host", "pings lost, gateway", "TCP sessions kept"):
        packets.add_column(column, justify="right")
    parts = Table("way", *PARTS, box=None, title="where the gap went, ms: median / p95", title_justify="left")
    for way, readings in by_way.items():
        gaps.add_row(
            way,
            cell([reading.pause_ms for reading in readings]),
            cell([reading.still_ms for reading in readings]),
            cell([reading.host.gap_ms for reading in readings]),
            cell([reading.host.gap_less_pause_ms for reading in readings]),
            cell([reading.gateway.gap_ms for reading in readings]),
            cell([reading.gateway.gap_less_pause_ms for reading in readings]),
        )
        packets.add_row(
            way,
            cell([reading.host.lost for reading in readings], 0),
            cell([reading.gateway.lost for reading in readings], 0),
            cell([reading.host.duplicated for reading in readings], 0),
            cell([reading.gateway.duplicated for reading in readings], 0),
            cell([reading.ping.lost for reading in readings], 0),
            cell([reading.gateway_ping.lost for reading in readings], 0),
            f"{sum(each.tcp.survived + each.gateway_tcp.survived for each in readings)} of {2 * len(readings)}",
        )
        told = [reading.parts_ms for reading in readings if reading.parts_ms]
        if told:
            spreads = [spread([each[name] for each in told]) for name in PARTS]
            parts.add_row(way, *(f"{found['median']:.1f} / {found['p95']:.1f}" for found in spreads))
    return [gaps, packets, parts]


async def _run(fleet: Fleet, guests: dict[Way, GuestRecord], ways: tuple[Way, ...], rounds: int) -> list[Reading]:
    sockets = {host: fleet.lab.libvirt_socket(host, "a") for host in (SOURCE, DESTINATION)}
    managed, plain = guests[Way.REDIRECT].name, guests[Way.LEARNING].name
    async with open_channel(f"unix:{fleet.lab.controller_socket('ctl1')}") as channel:
        bench = Bench(fleet, guests, channel)
        with watch_pauses(managed, sockets) as of_managed, watch_pauses(plain, sockets) as of_plain:
            await bench.run(ways, rounds, {managed: of_managed, plain: of_plain})
    return bench.readings


@click.command()
@click.option("--rounds", default=20, show_default=True, help="Moves of each way; one more warms up.")
@click.option("--way", "names", type=click.Choice([way.value for way in Way]), multiple=True, help="[default: all]")
def main(rounds: int, names: tuple[str, ...]) -> None:
    """Compares ways in which the network follows a guest, in a lab of its own."""
    ways = tuple(way for way in Way if not names or way.value in names)
    lab = Lab(
        Path(os.environ.get("HANDOFF_BENCH_DIR") or LAB), Path(os.environ.get("HANDOFF_PREFIX") or DEFAULT_PREFIX)
    )
    fleet = Fleet(lab)
    try:
        fleet.up(hosts=3, controllers=1, etcd=1)
        create = Guests(fleet).create
        managed = create("managed", SOURCE, MEMORY_MIB, network=RED.name)
        plain = create("plain", SOURCE, MEMORY_MIB, network=TENANT.name)
        guests = {way: managed if way is Way.REDIRECT else plain for way in Way}
        readings = asyncio.run(_run(fleet, guests, ways, rounds))
    finally:
        fleet.down()
    by_way = {way.value: [reading for reading in readings if reading.way == way.value] for way in ways}
    met = targets(by_way[Way.REDIRECT.value]) if Way.REDIRECT in ways else {}
    report = {
        "summary": {way: summary(of_way) for way, of_way in by_way.items()},
        "targets": met,
        "load_average": os.getloadavg(),
        "guest_memory_mib": MEMORY_MIB,
        "each": [asdict(reading) for reading in readings],
    }
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    console = Console(width=200, highlight=False)
    for table in tables(by_way):
        console.print()
        console.print(table)
    console.print()
    for target, is_met in met.items():
        console.print(f"{'met   ' if is_met else 'MISSED'} {target}")
    console.print(f"details in {REPORT}")


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("bench: the lab needs root")
    main()
