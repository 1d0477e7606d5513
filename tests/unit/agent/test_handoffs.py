"""Both sides of a handoff against two real libvirtds and QEMU 10; the guest is firmware that finds nothing to boot."""

import asyncio
import contextlib
import dataclasses
import errno
import functools
import os
import signal
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import libvirt
import pytest
from builds import QEMU, Builds
from one_host import remove_all
from ports import port
from processes import find_process, incoming_qemu

from handoff.agent.v1 import qemu_pb2 as pb
from handoff.agent.v1 import types_pb2 as types
from handoff_agent.arrival import Arrivals
from handoff_agent.convergence import ConvergenceSettings
from handoff_agent.departure import Departures
from handoff_agent.destination import Listener
from handoff_agent.disks.companions import DiskCompanions
from handoff_agent.disks.plans import DiskPlans
from handoff_agent.disks.settings import StorageSettings
from handoff_agent.disks.storage_daemon import Address
from handoff_agent.events import ConnectionEvent
from handoff_agent.handoff_changes import HandoffChanges
from handoff_agent.handoffs import Handoffs
from handoff_agent.inventory import Inventory
from handoff_agent.ledger import Ledger, Record, TermGuard
from handoff_agent.local_sockets import LocalSockets
from handoff_agent.monitor import Json, Monitor, QmpError
from handoff_agent.rules import (
    ABORTED,
    ACTIVE,
    DESTINATION,
    FAILED,
    FINALIZED,
    HELD,
    PREPARED,
    READY,
    RELEASED,
    SOURCE,
    SWITCHING,
    TRANSFERRING,
    Call,
    State,
)
from handoff_agent.settings import AgentSettings, HostTypeSettings, SlotSettings
from handoff_agent.slots import Hypervisor, Slot
from handoff_agent.survey import Survey
from handoff_common.errors import (
    DeadlineError,
    ExhaustedError,
    InvalidArgumentError,
    NotFoundError,
    PreconditionError,
    StaleTermError,
    UnavailableError,
)

MEMORY_MIB = 128
LIMITS = ConvergenceSettings(300)
DEADLINE_S = 2.0


class Host:
    """One agent's handoffs, without its gRPC server."""

    def __init__(
        self,
        name: str,
        uri: str,
        builds: Builds,
        state_dir: Path,
        first_port: int,
        disks: HostTypeSettings | None = None,
    ) -> None:
        """`disks`: where disks are kept that are local to it."""
        self.settings = AgentSettings(
            name=name,
            migration_address="127.0.0.1",
            memory_mib=1024,
            host_types={"standard": disks or HostTypeSettings()},
            slots={"a": SlotSettings(uri=uri)},
            emulators=builds.settings,
        )
        self.has_disks = disks is not None
        self.pull_bytes_per_s = 0
        self.state_dir = state_dir
        self.listener = Listener("127.0.0.1", first_port, first_port + 7)
        self.storage_address = Address("127.0.0.1", first_port + 8, first_port + 15)
        self.slot = Slot("a", uri)
        self.hypervisor = Hypervisor([self.slot])
        self.emulators = builds.emulators
        self.threads = ThreadPoolExecutor(4)
        self.handoffs: Handoffs

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Host"]:
        async with self.hypervisor.running():
            assert await self.slot.wait_connected(10)
            await self.start()
            yield self
            await self.handoffs.close()

    async def start(self) -> None:
        """Begins a life of the agent, with what is on disk of earlier ones."""
        inventory = Inventory(self.hypervisor, self.emulators, ())
        survey = Survey(self.settings, self.hypervisor, self.emulators, inventory)
        self.handoffs = Handoffs(
            self.hypervisor,
            Departures(self.hypervisor, inventory, survey, ()),
            Arrivals(
                survey,
                self.emulators,
                "127.0.0.1",
                DiskPlans(self.settings.name, "standard", self.settings.place_of_disks(), self.threads),
            ),
            self.listener,
            LocalSockets(self.state_dir / "run", "root"),
            Ledger(self.state_dir),
            TermGuard(self.state_dir),
            HandoffChanges(),
            DiskCompanions(
                StorageSettings(self.state_dir / "storage", self.storage_address, "root"), self.threads, (self.slot,)
            )
            if self.has_disks
            else None,
        )
        await self.handoffs.open()

    async def restart(self) -> None:
        await self.handoffs.close()
        await self.start()

    async def domain_names(self) -> list[str]:
        return await self.slot.call(lambda connection: [domain.name() for domain in connection.listAllDomains()])


@dataclass(frozen=True)
class Move:
    """A guest at `source`, to be handed to `target` as migration `id`."""

    id: str
    source: Host
    target: Host
    guest: str
    bandwidth: int = 0
    fast: bool = False

    async def until(self, *states: State) -> pb.Handoff:
        """The source's side once it is in one of the states; FAILED ends the wait as well."""
        handoff = self.source.handoffs.get(self.id, SOURCE)
        async with asyncio.timeout(30):
            while True:
                change = handoff.next_change()
                message = handoff.to_message()
                if message.state in (*states, FAILED):
                    return message
                await change.wait()

    async def advance(self, goal: State, *, deadline_s: float = DEADLINE_S) -> None:
        """Takes the steps of a leader until the source's side is at `goal`."""
        source = await self.prepare_source()
        if goal == PREPARED:
            return
        prepared = await self.target.handoffs.prepare_destination(
            self.id,
            source,
            "a",
            validate_only=False,
            fast=self.fast,
            bandwidth_bytes_per_s=self.target.pull_bytes_per_s,
        )
        side = self.source.handoffs.source(self.id, Call.START_TRANSFER)
        handoff = prepared.handoff
        await side.start_transfer(handoff.listen_uri, LIMITS, self.bandwidth, deadline_s, handoff.disks)
        if goal == TRANSFERRING:
            return
        assert (await self.until(READY)).state == READY
        if goal == READY:
            return
        await side.switch_over()
        if goal == HELD:
            handoff = await self.until(HELD)
            assert handoff.state == HELD, handoff.message

    async def prepare_source(self) -> pb.SourceGuest:
        if self.fast:
            _, guest = await self.source.handoffs.prepare_source(self.id, self.guest, validate_only=True)
            planned = await self.target.handoffs.prepare_destination(self.id, guest, "a", validate_only=True, fast=True)
            disks = planned.handoff.disks
            return (await self.source.handoffs.prepare_source(self.id, self.guest, validate_only=False, disks=disks))[1]
        return (await self.source.handoffs.prepare_source(self.id, self.guest, validate_only=False))[1]

    async def abort(self) -> None:
        for host, role in ((self.target, DESTINATION), (self.source, SOURCE)):
            assert (await host.handoffs.abort(self.id, role, "the test says so")).state == ABORTED

    async def is_running(self, host: Host) -> bool:
        return await Monitor(host.slot, self.guest).query_status() == "running"


@pytest.fixture
async def hosts(libvirtd: str, other_libvirtd: str, builds: Builds, tmp_path: Path) -> AsyncIterator[tuple[Host, Host]]:
    one = Host("h1", libvirtd, builds, tmp_path / "1", port(0))
    two = Host("h2", other_libvirtd, builds, tmp_path / "2", port(16))
    async with one.running(), two.running():
        yield one, two


@pytest.fixture
async def move(hosts: tuple[Host, Host]) -> AsyncIterator[Move]:
    source, target = hosts
    name, identity = f"g-{uuid.uuid4().hex[:6]}", str(uuid.uuid4())
    xml = f"""<domain type='qemu'><name>{name}</name><uuid>{identity}</uuid><memory unit='MiB'>{MEMORY_MIB}</memory>
    <vcpu>1</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features><devices>
    <emulator>{QEMU}</emulator>
    </devices></domain>"""

    def define(connection: libvirt.virConnect) -> None:
        domain = connection.defineXML(xml)
        domain.setAutostart(1)
        domain.create()

    await source.slot.call(define)
    yield Move(f"m-{uuid.uuid4().hex[:8]}", source, target, identity)
    await remove_all(source.hypervisor, target.hypervisor)


async def autostart(host: Host, guest: str) -> int:
    return await host.slot.on_domain(guest, lambda domain: domain.autostart())


async def test_a_guest_is_handed_over_and_nothing_is_left(move: Move) -> None:
    await move.advance(HELD)
    assert await autostart(move.source, move.guest) == 0
    assert not await move.is_running(move.source)
    destination = move.target.handoffs.destination(move.id, Call.ACTIVATE)
    await destination.activate()
    assert destination.state == ACTIVE
    assert await move.is_running(move.target)
    source = move.source.handoffs.source(move.id, Call.RELEASE)
    await source.release()
    await destination.finalize()
    assert (source.state, destination.state) == (RELEASED, FINALIZED)
    assert await move.source.domain_names() == []
    assert await autostart(move.target, move.guest) == 1
    left, arrived = source.to_message(), destination.to_message()
    assert 0 < left.switch_timings.paused_to_held_ms < 1000 * DEADLINE_S
    assert left.progress.ram_total_bytes >= MEMORY_MIB << 20
    assert arrived.activate_timings.running_time.ToNanoseconds() > left.switch_timings.paused_time.ToNanoseconds()
    persistent = await move.target.slot.on_domain(move.guest, lambda d: d.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    assert "-incoming" not in persistent


@pytest.mark.parametrize("stage", [PREPARED, TRANSFERRING, READY, SWITCHING, HELD], ids=pb.HandoffState.Name)
async def test_an_abort_leaves_the_guest_as_it_was(move: Move, stage: State) -> None:
    await move.advance(stage)
    await move.abort()
    assert await move.is_running(move.source)
    assert await move.target.domain_names() == []
    assert await autostart(move.source, move.guest) == 1
    capabilities = await Monitor(move.source.slot, move.guest).query_capabilities()
    assert not capabilities["switchover-ack"]
    assert not capabilities["pause-before-switchover"]
    with pytest.raises(PreconditionError, match="was aborted"):
        await move.prepare_source()
    await Move(f"{move.id}-again", move.source, move.target, move.guest).advance(HELD)


async def test_the_guest_runs_until_the_switch_is_ordered(move: Move) -> None:
    await move.advance(READY)
    monitor = Monitor(move.source.slot, move.guest)
    with move.source.slot.events(move.guest) as events:
        assert await events.next_within(2.0) is None
    assert await monitor.query_status() == "running"
    assert move.source.handoffs.get(move.id, SOURCE).state == READY


async def test_a_transfer_that_breaks_as_the_switch_is_ordered_stays_failed(
    move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    await move.advance(READY)
    side = move.source.handoffs.source(move.id, Call.SWITCH_OVER)

    async def breaks(*_: object) -> bool:
        await side.change(state=FAILED, message="the transfer broke")
        return True

    monkeypatch.setattr("handoff_agent.source.user_runs_it", breaks)
    await side.switch_over()
    assert side.state == FAILED


async def test_a_pause_past_its_deadline_ends_with_the_guest_running_here(move: Move) -> None:
    await move.advance(SWITCHING, deadline_s=0.0001)
    failed = await move.until(HELD)
    assert failed.state == FAILED
    assert "was paused for more than" in failed.message
    assert await move.is_running(move.source)


async def test_a_hold_that_cant_be_written_down_is_none(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent's next life would not know of it."""
    monkeypatch.setattr(Ledger, "save", all_but(HELD))
    await move.advance(SWITCHING)
    failed = await move.until(HELD)
    assert failed.state == FAILED
    assert "can't be written down: Input/output error" in failed.message
    assert await move.is_running(move.source)
    await move.abort()


@pytest.mark.parametrize("missed", [PREPARED, ACTIVE], ids=["order", "run"])
async def test_an_activation_that_cant_be_written_down_is_repeated(
    move: Move, monkeypatch: pytest.MonkeyPatch, missed: State
) -> None:
    await move.advance(HELD)
    destination = move.target.handoffs.destination(move.id, Call.ACTIVATE)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "save", all_but(missed))
        with pytest.raises(ExhaustedError, match="look at the agent's state_dir"):
            await destination.activate()
        assert destination.to_message().state == PREPARED
        assert await move.is_running(move.target) is (missed == ACTIVE)
    await destination.activate()
    assert destination.to_message().state == ACTIVE
    assert await move.is_running(move.target)


def all_but(state: State) -> Callable[[Ledger, Record], None]:
    """Ledger.save of a disk that does not take records in this state."""
    save = Ledger.save

    def save_others(ledger: Ledger, record: Record) -> None:
        if record.state == state:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        save(ledger, record)

    return save_others


@contextlib.contextmanager
def frozen(host: Host) -> Iterator[None]:
    """The host's libvirtd does not answer; its QEMUs go on."""
    pid_file = host.slot.uri.partition("socket=")[2].replace("libvirt-sock", "libvirtd.pid")
    pid = find_process(lambda words: words[:3] == [b"libvirtd", b"-p", pid_file.encode()])
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_what_is_not_known_is_not_called_failed(move: Move) -> None:
    await move.advance(HELD)
    destination = move.target.handoffs.destination(move.id, Call.ACTIVATE)
    with frozen(move.target):
        with pytest.raises((DeadlineError, UnavailableError)):
            await destination.activate()
        assert destination.state == PREPARED
    assert await move.target.slot.wait_connected(20)
    await destination.activate()
    assert destination.state == ACTIVE
    assert await move.is_running(move.target)


async def test_a_source_whose_libvirtd_froze_in_the_copy_goes_on(move: Move) -> None:
    await move.advance(TRANSFERRING)
    with frozen(move.source), move.source.slot.events() as events:
        async with asyncio.timeout(20):
            while not isinstance(await events.next(), ConnectionEvent):
                pass
    assert (await move.until(READY)).state == READY
    await move.abort()
    assert await move.is_running(move.source)


async def test_a_destination_that_goes_away_never_ran(move: Move) -> None:
    await move.advance(TRANSFERRING)
    destination = move.target.handoffs.destination(move.id, Call.ACTIVATE)
    change = destination.next_change()
    await move.target.slot.on_domain(move.guest, lambda domain: domain.destroy())
    await asyncio.wait_for(change.wait(), 10)
    assert destination.state == FAILED
    assert destination.to_message().never_ran
    assert (await move.until(FAILED)).state == FAILED
    assert await move.is_running(move.source)


async def test_a_destination_that_is_killed_just_before_it_is_told_to_run_never_ran(move: Move) -> None:
    """libvirt still takes the domain for a live one when Activate comes."""
    await move.advance(HELD)
    destination = move.target.handoffs.destination(move.id, Call.ACTIVATE)
    os.kill(incoming_qemu(move.guest), signal.SIGKILL)
    await destination.activate()
    assert destination.state == FAILED
    assert destination.to_message().never_ran
    await move.abort()
    assert await move.is_running(move.source)


async def test_a_source_that_goes_away_fails_and_says_so(move: Move) -> None:
    await move.advance(READY)
    await move.source.slot.on_domain(move.guest, lambda domain: domain.destroy())
    failed = await move.until(FAILED)
    assert "its QEMU is gone" in failed.message


@pytest.mark.parametrize("stage", [PREPARED, TRANSFERRING, READY, SWITCHING, HELD], ids=pb.HandoffState.Name)
async def test_a_restarted_agent_takes_the_handoff_up(move: Move, stage: State) -> None:
    await move.advance(stage)
    await move.source.restart()
    await move.target.restart()
    assert (move.source.handoffs.leaving(), move.target.handoffs.leaving()) == ({move.guest}, frozenset())
    if stage == PREPARED:
        await move.abort()
        assert await move.is_running(move.source)
        return
    if stage in (TRANSFERRING, READY):
        assert (await move.until(READY)).state == READY
        await move.source.handoffs.source(move.id, Call.SWITCH_OVER).switch_over()
    assert (await move.until(HELD)).state == HELD
    destination = move.target.handoffs.destination(move.id, Call.ACTIVATE)
    await destination.activate()
    assert destination.state == ACTIVE
    await move.source.handoffs.source(move.id, Call.RELEASE).release()
    await destination.finalize()
    await move.source.restart()
    await move.source.handoffs.source(move.id, Call.RELEASE).release()
    assert move.source.handoffs.get(move.id, SOURCE).state == RELEASED
    assert move.source.handoffs.leaving() == frozenset()


async def test_a_paused_guest_moves_paused(move: Move) -> None:
    await move.source.slot.on_domain(move.guest, lambda domain: domain.suspend())
    await move.advance(HELD)
    destination = move.target.handoffs.destination(move.id, Call.ACTIVATE)
    await destination.activate(keep_paused=True)
    assert destination.state == ACTIVE
    assert await Monitor(move.target.slot, move.guest).query_status() == "paused"


@pytest.mark.parametrize("stage", [TRANSFERRING, READY], ids=["copying", "ready"])
async def test_a_guest_that_its_user_pauses_during_the_copy_moves_paused(move: Move, stage: State) -> None:
    await move.advance(stage)
    await move.source.slot.on_domain(move.guest, lambda domain: domain.suspend())
    # Longer than a pause of QEMU's own would be left alone.
    await asyncio.sleep(1.0)
    assert (await move.until(READY)).state == READY
    await move.source.handoffs.source(move.id, Call.SWITCH_OVER).switch_over()
    held = await move.until(HELD)
    assert (held.state, held.was_running) == (HELD, False)
    destination = move.target.handoffs.destination(move.id, Call.ACTIVATE)
    await destination.activate(keep_paused=True)
    assert destination.state == ACTIVE
    assert await Monitor(move.target.slot, move.guest).query_status() == "paused"


async def test_a_guest_that_its_user_runs_again_moves_running(move: Move) -> None:
    await move.source.slot.on_domain(move.guest, lambda domain: domain.suspend())
    await move.advance(PREPARED)
    await move.source.slot.on_domain(move.guest, lambda domain: domain.resume())
    await move.advance(HELD)
    held = await move.until(HELD)
    assert (held.state, held.was_running) == (HELD, True)
    await move.target.handoffs.destination(move.id, Call.ACTIVATE).activate()
    assert await move.is_running(move.target)


async def test_a_guest_that_its_user_paused_stays_paused_after_an_abort(move: Move) -> None:
    await move.advance(READY)
    await move.source.slot.on_domain(move.guest, lambda domain: domain.suspend())
    await asyncio.sleep(0.2)
    await move.abort()
    assert not await move.is_running(move.source)


async def test_what_ended_after_it_ran_is_told(move: Move) -> None:
    await move.advance(HELD)
    destination = move.target.handoffs.destination(move.id, Call.ACTIVATE)
    await destination.activate()
    await move.target.slot.on_domain(move.guest, lambda domain: domain.destroy())
    await destination.finalize()
    assert (destination.state, destination.to_message().ended) == (FINALIZED, True)


async def test_a_copy_that_ran_on_a_fenced_host_is_destroyed(move: Move) -> None:
    await move.advance(HELD)
    await move.target.handoffs.destination(move.id, Call.ACTIVATE).activate()
    with pytest.raises(PreconditionError):
        await move.target.handoffs.abort(move.id, DESTINATION, "no")
    await move.target.restart()
    assert (await move.target.handoffs.abort(move.id, DESTINATION, "fenced", fenced=True)).state == ABORTED
    assert await move.target.domain_names() == []


async def test_repeated_calls_change_nothing(move: Move) -> None:
    first = await move.prepare_source()
    second = await move.prepare_source()
    assert first.autostart
    assert second.autostart
    await move.advance(HELD)
    source = move.source.handoffs.source(move.id, Call.SWITCH_OVER)
    await source.start_transfer("tcp:127.0.0.1:1", LIMITS, 0, DEADLINE_S)
    await source.switch_over()
    assert source.state == HELD


async def test_a_guest_is_in_one_handoff_at_a_time(move: Move) -> None:
    await move.prepare_source()
    assert move.source.handoffs.migration_of(move.guest) == move.id
    with pytest.raises(PreconditionError, match=move.id):
        await move.source.handoffs.prepare_source("another", move.guest, validate_only=False)


async def test_what_an_earlier_migration_left_is_settled_first(move: Move) -> None:
    """Its orders are for whatever has the guest's UUID here: they must not meet the next copy."""
    await move.advance(TRANSFERRING)
    destination = move.target.handoffs.destination(move.id, Call.ACTIVATE)
    change = destination.next_change()
    await move.source.handoffs.abort(move.id, SOURCE, "cancelled")
    async with asyncio.timeout(10):
        await change.wait()
    assert destination.state == FAILED
    again = dataclasses.replace(move, id=f"{move.id}-2")
    guest = await again.prepare_source()
    prepare = functools.partial(move.target.handoffs.prepare_destination, again.id, guest, "a")
    with pytest.raises(UnavailableError, match=move.id):
        await prepare(validate_only=False)
    with pytest.raises(PreconditionError, match="try again"):
        await prepare(validate_only=True)
    assert await move.target.domain_names() == []
    await move.target.handoffs.abort(move.id, DESTINATION, "cancelled")
    assert (await prepare(validate_only=False)).handoff.state == PREPARED
    await again.abort()


async def test_a_check_leaves_no_trace(move: Move) -> None:
    _, guest = await move.source.handoffs.prepare_source(move.id, move.guest, validate_only=True)
    await move.target.handoffs.prepare_destination(move.id, guest, "a", validate_only=True)
    assert await autostart(move.source, move.guest) == 1
    assert await move.target.domain_names() == []
    for host in (move.source, move.target):
        assert not host.handoffs.all()
        assert not list((host.state_dir / "handoffs").glob("*.json"))


async def test_a_guest_that_can_not_start_leaves_nothing(move: Move) -> None:
    guest = await move.prepare_source()
    guest.live_xml = guest.live_xml.replace("</os>", "<kernel>/does/not/exist</kernel></os>")
    with pytest.raises(PreconditionError, match="can't be started here"):
        await move.target.handoffs.prepare_destination(move.id, guest, "a", validate_only=False)
    assert await move.target.domain_names() == []
    assert not list((move.target.state_dir / "handoffs").glob("*.json"))


async def test_a_transfer_that_could_not_begin_leaves_qemu_no_connection(
    move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = Monitor.execute

    async def hangs(self: Monitor, command: str, arguments: Mapping[str, Json] | None = None, **options: bool) -> Json:
        if command == "migrate":
            raise DeadlineError("libvirtd does not answer")
        return await execute(self, command, arguments, **options)

    monkeypatch.setattr(Monitor, "execute", hangs)
    await move.advance(TRANSFERRING)
    assert "libvirtd does not answer" in (await move.until(FAILED)).message
    with pytest.raises(QmpError, match="not found"):
        await Monitor(move.source.slot, move.guest).execute("closefd", {"fdname": "handoff"})


async def test_an_unreachable_destination_fails_the_transfer(move: Move) -> None:
    await move.prepare_source()
    source = move.source.handoffs.source(move.id, Call.START_TRANSFER)
    await source.start_transfer("tcp:127.0.0.1:1", LIMITS, 0, DEADLINE_S)
    assert source.state == FAILED
    assert "can't be reached" in source.record.message
    assert await move.is_running(move.source)


async def test_a_handoff_aborted_before_it_was_heard_of_can_not_begin(move: Move) -> None:
    await move.source.handoffs.abort(move.id, SOURCE, "cancelled")
    await move.source.restart()
    with pytest.raises(PreconditionError, match="was aborted"):
        await move.prepare_source()


async def test_calls_that_are_wrong_whatever_the_state(hosts: tuple[Host, Host]) -> None:
    handoffs = hosts[0].handoffs
    with pytest.raises(NotFoundError):
        handoffs.get("unknown", SOURCE)
    with pytest.raises(PreconditionError, match="has not heard"):
        handoffs.source("unknown", Call.SWITCH_OVER)
    with pytest.raises(InvalidArgumentError):
        await handoffs.abort("../etc/passwd", SOURCE, "")
    with pytest.raises(InvalidArgumentError):
        await handoffs.admit(types.Fence())
    await handoffs.admit(types.Fence(term=9, leader="c1"))
    with pytest.raises(StaleTermError):
        await handoffs.admit(types.Fence(term=8, leader="c2"))
