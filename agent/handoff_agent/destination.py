"""The destination's side of a handoff: a domain that waits for its state, runs when told to, and then stays.

PrepareDestination    createXML, paused, -incoming defer; migrate-incoming          PREPARED
  (memory passed on)  createXML goes on until the source has sent the descriptors
                      SwitchOver at the source: migrate-incoming
                      (QEMU loads what the source sends: [inmigrate], then [paused])
Activate              "activating" on disk; resume; RESUME event                    ACTIVE
FinalizeDestination   define, autostart                                             FINALIZED
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

import libvirt

from handoff_agent.companions import DestinationCompanion, each, together
from handoff_agent.domains import end_domain, is_active, was_shut_down
from handoff_agent.events import ConnectionEvent, Event, LifecycleEvent, MonitorEvent, Subscription
from handoff_agent.handoff import Handoff, Notify, Save
from handoff_agent.ledger import Record
from handoff_agent.local_sockets import CPR, MULTIFD, UNIX, LocalSockets, cpr_socket, listens, main_socket
from handoff_agent.monitor import MigrationStatus, Monitor, QmpError
from handoff_agent.outgoing import MULTIFD_CAPABILITY, MULTIFD_PARAMETERS
from handoff_agent.rules import ABORTED, ACTIVE, FAILED, FINALIZED, PREPARED, Call
from handoff_agent.slots import CALL_TIMEOUT_S, LibvirtFailure, Slot
from handoff_common.errors import (
    DeadlineError,
    ExhaustedError,
    HandoffError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)

# Starting a QEMU takes 0.4 to 0.9 s; on a machine that pages, much longer.
CREATE_TIMEOUT_S: Final = 30.0
ACCEPT_TIMEOUT_S: Final = 2.0
SOCKET_POLL_S: Final = 0.005
ACTIVATE_TIMEOUT_S: Final = 5.0
# One that hangs is given up before it is told to run, for then it is known that it never did.
ANSWER_TIMEOUT_S: Final = 2.0
ACTIVATE_RETRY_S: Final = 0.1
LAST_LOOK_S: Final = 1.0
LAST_LOOK_POLL_S: Final = 0.02
WATCH_RETRY_S: Final = 1.0

_CAPABILITIES: Final = {"return-path": True, "events": True}
# Else QEMU takes the locks of the images when it has loaded the guest, and the source could not have it back.
_LATE_ACTIVATION: Final = "late-block-activate"
_ARRIVED_STATUSES: Final = ("paused", "prelaunch")
_NOT_RUN_STATUSES: Final = ("inmigrate", "paused", "prelaunch")
_ANNOUNCE: Final = {"initial": 50, "max": 550, "rounds": 5, "step": 100}


class _LastLook(Enum):
    """How QEMU is found right before it is told to run."""

    ANSWERS = auto()
    HANGS = auto()
    ENDED = auto()


@dataclass(frozen=True, slots=True)
class Listener:
    """Where migration streams come in on this host."""

    address: str
    first_port: int
    last_port: int


@dataclass(frozen=True, slots=True)
class Folder:
    """Where a guest comes in from another slot of this host."""

    path: str
    passes_on: bool
    """Its memory is passed on, not copied."""
    multifd: bool = False
    """It is copied over several connections."""


class DestinationHandoff(Handoff):
    """One guest that comes."""

    def __init__(self, record: Record, save: Save, notify: Notify, slot: Slot, sockets: LocalSockets) -> None:
        super().__init__(record, save, notify)
        self.companions: Sequence[DestinationCompanion] = ()
        self._slot = slot
        self._sockets = sockets
        self._hangs = False
        self._knows_created = False
        self._knows_running = False
        self._starting: asyncio.Task[None] | None = None
        self._monitor = Monitor(slot, record.domain_uuid)
        self._guard: asyncio.Task[None] | None = None
        self.left_behind = False
        """`create` failed, and so did its undoing: `watch` goes on with that."""

    # The leader's calls. Each holds the lock, and is repeatable.

    async def create(self, xml: str, entrance: Listener | Folder) -> None:
        """Creates the domain and listens; PREPARED on return. On any failure nothing is left behind.

        A domain whose memory is passed on has then begun to start: QEMU waits for the memory.
        Raises PreconditionError when libvirt or QEMU refuse it, ExhaustedError when no port is free, and DeadlineError
        or UnavailableError as Slot.call does.
        """
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self._undo_create)
            for companion in self.companions:
                xml = await companion.prepare(xml)
            match entrance:
                case Listener():
                    await self._start(xml)
                    port = await self._listen(entrance)
                    uri = f"tcp:{_bracketed(entrance.address)}:{port}"
                case Folder(path=path, passes_on=False, multifd=multifd):
                    self._sockets.make(self.record.migration_id)
                    await self._start(xml)
                    if multifd:
                        await self._monitor.set_capabilities(MULTIFD_CAPABILITY)
                        await self._monitor.execute("migrate-set-parameters", MULTIFD_PARAMETERS)
                    await self._listen_locally(path)
                    uri = f"{MULTIFD if multifd else UNIX}{main_socket(path)}"
                case Folder(path=path):
                    self._sockets.make(self.record.migration_id)
                    self._starting = asyncio.create_task(self._start(xml), name=f"start-{self.record.migration_id}")
                    await self._until_it_waits(path)
                    uri = f"{CPR}{path}"
            await self.change(state=PREPARED, listen_uri=uri)
            undo.pop_all()
        self.watch()

    async def is_started(self) -> bool:
        """Its QEMU has the memory that is passed on, and answers. Raises what its start raised."""
        if self._starting is not None:
            return self._starting.done() and self._starting.result() is None
        # Begun by an earlier life of the agent.
        if not await is_active(self._slot, self.record.domain_uuid):
            raise PreconditionError(f"guest {self.record.domain_name}: the new QEMU has ended")
        try:
            await self._monitor.query_status(timeout_s=ACCEPT_TIMEOUT_S)
        except DeadlineError:
            return False
        await self._tell_created()
        return True

    async def accept(self) -> None:
        """Lets QEMU take the devices' state; may be repeated. Raises as Monitor.execute does."""
        try:
            await self._listen_locally(self.record.listen_uri.removeprefix(CPR), ACCEPT_TIMEOUT_S)
        except QmpError:
            # By an earlier life of the agent.
            if (await self._monitor.query_migrate(urgent=True)).status is MigrationStatus.NONE:
                raise

    async def activate(self, *, keep_paused: bool = False) -> None:
        """Runs the guest, unless its user had paused it; ACTIVE on return, or FAILED.

        Raises DeadlineError or UnavailableError when it is not known whether it runs: it may be, or still come to it.
        Ask again then.
        """
        arrived, arrived_s = time.monotonic(), time.time()
        async with self.lock:
            if not self.permits(Call.ACTIVATE):
                return
            if self.record.was_running is keep_paused:
                await self.change(was_running=not keep_paused)
            if self.record.was_running:
                await self._run_here(arrived + ACTIVATE_TIMEOUT_S, arrived_s)
            else:
                await self._keep_paused()
            if self.state != ACTIVE and not self._ended_here():
                return
        await asyncio.gather(
            self._monitor.execute("announce-self", _ANNOUNCE), self._tell_running(), return_exceptions=True
        )
        if not self._knows_running and self.record.pulling:
            self.watch()  # the leader finalizes only when all is pulled

    async def _run_here(self, deadline: float, arrived_s: float) -> None:
        """ACTIVE once QEMU says that the guest runs, FAILED if it certainly won't. Raises as `_run` does."""
        first = not self.record.activating
        if not await self._may_run(first=first):
            return
        # From here on only QEMU's own word, or the domain's end, can tell that it never ran. A last look, in the time
        # that the record takes: libvirt does not notice at once that a QEMU was killed.
        seen, _ = await asyncio.gather(self._last_look(), self.change(activating=True))
        if first and seen is not _LastLook.ANSWERS:
            self._hangs = seen is _LastLook.HANGS
            what = "does not answer, and was not told to run" if self._hangs else "had ended before it was told to run"
            await self.change(state=FAILED, message=f"its QEMU {what}", never_ran=True)
            return
        with self._slot.events(self.record.domain_uuid) as events:
            ran_s = await self._run(events, deadline, first=first)
        if ran_s is None:
            return
        self._stop_watching()
        await self.change(state=ACTIVE, running_s=ran_s, call_to_running_ms=max(0.0, 1000 * (ran_s - arrived_s)))

    async def _last_look(self) -> _LastLook:
        """How QEMU is before it is told to run. Raises as Slot.call does when it is libvirtd that does not answer."""
        try:
            await self._monitor.query_status(timeout_s=ANSWER_TIMEOUT_S, urgent=True)
        except UnavailableError:
            raise
        except DeadlineError:
            await self._slot.call(lambda connection: connection.getLibVersion(), ANSWER_TIMEOUT_S, urgent=True)
            return _LastLook.HANGS
        except HandoffError:
            deadline = time.monotonic() + LAST_LOOK_S
            while time.monotonic() < deadline:
                with contextlib.suppress(DeadlineError, UnavailableError):
                    if not await is_active(self._slot, self.record.domain_uuid):
                        return _LastLook.ENDED
                await asyncio.sleep(LAST_LOOK_POLL_S)
        return _LastLook.ANSWERS

    async def _may_run(self, *, first: bool) -> bool:
        """The companions have done what comes before the guest runs; FAILED if not. `first`: as of `_run`."""
        try:
            async with asyncio.timeout(ACTIVATE_TIMEOUT_S):
                await together(companion.before_run() for companion in self.companions)
            return True
        except HandoffError as error:
            reason = error.message
        except TimeoutError:
            reason = f"what comes before it took more than {ACTIVATE_TIMEOUT_S:g} s"
        if first:
            await self.change(state=FAILED, message=f"the guest was not run: {reason}", never_ran=True)
            return False
        self.log.warning("companion", error=reason)
        return True

    async def _tell_created(self) -> None:
        if not self._knows_created:
            await together(companion.created() for companion in self.companions)
            self._knows_created = True

    def _ended_here(self) -> bool:
        """It may have run, and its disks are what counts now."""
        return self.state == FAILED and self.record.activating and not self.record.never_ran

    async def _go_on(self) -> None:
        """What an earlier life of the agent was told when the guest ran."""
        while True:
            try:
                await self._tell_running()
                return
            except HandoffError:
                await asyncio.sleep(WATCH_RETRY_S)

    async def _tell_running(self) -> None:
        """Raises the first failure, all of which are logged."""
        if not self._knows_running:
            await each((companion.running() for companion in self.companions), self.log)
            self._knows_running = True

    async def _keep_paused(self) -> None:
        """ACTIVE for a guest that its user had paused, if it is there; FAILED if not."""
        arrived = (
            await is_active(self._slot, self.record.domain_uuid)
            and await self._monitor.query_status(urgent=True) in _ARRIVED_STATUSES
        )
        if arrived:
            if await self._may_run(first=True):
                self._stop_watching()
                await self.change(state=ACTIVE)
        else:
            await self.change(state=FAILED, message="the paused guest is not there", never_ran=True)

    async def finalize(self) -> None:
        """Makes the definition persistent, with its autostart; may be repeated.

        Raises as Slot.call does, and what a companion raises.
        """
        async with self.lock:
            if not self.permits(Call.FINALIZE):
                return
            uuid = self.record.domain_uuid
            # While disks are pulled there is time to shut a guest down, and that is no loss.
            ended = not await is_active(self._slot, uuid) and not await was_shut_down(self._slot, uuid)
            xml, autostart = self.record.persistent_xml, self.record.autostart

            def define(connection: libvirt.virConnect) -> None:
                domain = connection.defineXML(xml)
                domain.setAutostart(int(autostart))

            if xml:
                await self._slot.call(define)
            self._sockets.remove(self.record.migration_id)
            if self.state == ACTIVE:
                await self._tell_running()
            await each((companion.finalize() for companion in self.companions), self.log)
            await self.change(state=FINALIZED, ended=ended)

    async def abort(self, reason: str, *, fenced: bool = False) -> None:
        """Destroys the domain; one that runs only when this host was `fenced`, and the guest goes on elsewhere.

        Raises as end_domain does, and what a companion raises.
        """
        async with self.lock:
            if not self.permits(Call.EVICT if fenced else Call.ABORT):
                return
            self._stop_watching()
            await self._destroy()
            never_ran = self.record.never_ran or not self.record.activating
            await self.change(state=ABORTED, message=reason, never_ran=never_ran)

    def watch(self) -> None:
        """Notices when the incoming domain goes away before it was activated; also after a restart of the agent."""
        if self.state == PREPARED:
            self._guard = asyncio.create_task(self._watch(), name=f"destination-{self.record.migration_id}")
        elif self.record.pulling and (self.state == ACTIVE or self._ended_here()):
            self._guard = asyncio.create_task(self._go_on(), name=f"destination-{self.record.migration_id}")

    async def detach(self) -> None:
        """Ends the agent's work on it, for the agent's own end. The domain stays as it is."""
        self._stop_watching()
        await self._stop_starting()
        await each((companion.detach() for companion in self.companions), self.log)

    # Effects.

    async def _start(self, xml: str) -> None:
        try:
            await self._slot.call(
                lambda connection: connection.createXML(xml, libvirt.VIR_DOMAIN_START_PAUSED), CREATE_TIMEOUT_S
            )
        except LibvirtFailure as error:
            raise PreconditionError(f"guest {self.record.domain_name} can't be started here: {error.message}") from None
        known = await self._monitor.query_capabilities()
        late = {_LATE_ACTIVATION: True} if _LATE_ACTIVATION in known else {}
        await self._monitor.set_capabilities(_CAPABILITIES | late)
        await self._tell_created()

    async def _until_it_waits(self, folder: str) -> None:
        """Waits until QEMU waits for the memory; libvirt's call goes on until it has come."""
        assert self._starting is not None
        path, deadline = cpr_socket(folder), time.monotonic() + CREATE_TIMEOUT_S
        while not listens(path):
            await asyncio.wait({self._starting}, timeout=SOCKET_POLL_S)
            if self._starting.done():
                self._starting.result()
                raise PreconditionError(f"guest {self.record.domain_name}: the new QEMU did not ask for its memory")
            if time.monotonic() > deadline:
                raise DeadlineError(f"guest {self.record.domain_name}: the new QEMU hangs while it starts")

    async def _stop_starting(self) -> bool:
        """Waits no longer for a start that has not ended; tells whether there was one."""
        if self._starting is None:
            return False
        was_starting = not self._starting.done()
        self._starting.cancel()
        await asyncio.gather(self._starting, return_exceptions=True)
        return was_starting

    async def _listen_locally(self, folder: str, timeout_s: float = CALL_TIMEOUT_S) -> None:
        uri = {"uri": f"unix:{main_socket(folder)}"}
        await self._monitor.execute("migrate-incoming", uri, timeout_s=timeout_s, urgent=True)

    async def _listen(self, listener: Listener) -> int:
        """Lets QEMU listen on the first free port, and returns it."""
        uri = f"tcp:{_bracketed(listener.address)}:{listener.first_port},to={listener.last_port}"
        where = f"{listener.address}, ports {listener.first_port} to {listener.last_port}"
        try:
            await self._monitor.execute("migrate-incoming", {"uri": uri})
        except QmpError as error:
            raise ExhaustedError(f"QEMU can't listen on {where}: {error.desc}") from None
        ports = (await self._monitor.query_migrate()).ports
        if not ports:
            raise ExhaustedError(f"QEMU does not listen on {where}")
        return ports[0]

    async def _run(self, events: Subscription, deadline: float, *, first: bool) -> float | None:
        """Resumes the guest until QEMU reports that it runs; returns the time, in seconds since the epoch.

        Returns None when it certainly won't run: FAILED then. `first`: it was never told to run before. Raises
        DeadlineError or UnavailableError when that can't be known.
        """
        # libvirt refuses to resume a domain that it finds ended, before it says a word to QEMU.
        never_told = first
        while True:
            refusal = ""
            try:
                await self._slot.on_domain(
                    self.record.domain_uuid,
                    lambda domain: domain.resume(),
                    max(ACTIVATE_RETRY_S, deadline - time.monotonic()),
                    urgent=True,
                )
            except (DeadlineError, UnavailableError):
                raise
            except HandoffError as error:
                refusal = error.message
                never_told = never_told and isinstance(error, PreconditionError | NotFoundError)
            else:
                never_told = False
            wait_s = ACTIVATE_RETRY_S if refusal else deadline - time.monotonic()
            if (event := await _resumed(events, wait_s)) is not None:
                return event.time_s
            if not await is_active(self._slot, self.record.domain_uuid):
                await self.change(state=FAILED, message="its QEMU ended as it was told to run", never_ran=never_told)
                return None
            status = await self._monitor.query_status(urgent=True)
            if status not in _NOT_RUN_STATUSES:  # by an earlier call
                return time.time()
            if time.monotonic() > deadline:
                if not refusal:
                    raise DeadlineError(
                        f"guest {self.record.domain_name}: QEMU has not run it within {ACTIVATE_TIMEOUT_S:g} s"
                        f" ({status})"
                    )
                await self.change(state=FAILED, message=f"the guest could not be run: {refusal}", never_ran=first)
                return None

    async def _watch(self) -> None:
        with self._slot.events(self.record.domain_uuid) as events:
            timeout_s = 0.0
            while self.state == PREPARED:
                if not self.record.listen_uri:
                    await self._remove_unfinished()
                    continue
                event = await events.next_within(timeout_s)
                timeout_s = WATCH_RETRY_S
                if event is None or isinstance(event, ConnectionEvent) or _is_end(event):
                    try:
                        active = await is_active(self._slot, self.record.domain_uuid)
                    except HandoffError:
                        continue
                    if not active:
                        await self._note_end()
                    timeout_s = 60.0

    async def _note_end(self) -> None:
        """FAILED, unless an order that is being carried out, such as an abort, is why the domain ended."""
        async with self.lock:
            if self.state == PREPARED and not self.record.activating:
                await self.change(
                    state=FAILED,
                    message=f"guest {self.record.domain_name}: its QEMU at the destination ended",
                    never_ran=True,
                )

    async def _remove_unfinished(self) -> None:
        """Removes the domain that an agent was creating when it died."""
        told = ""
        while self.state == PREPARED:
            try:
                await self._destroy()
            except HandoffError as error:
                if error.message != told:
                    told = error.message
                    self.log.warning("what an earlier life had begun can't be undone yet", error=told)
                await asyncio.sleep(WATCH_RETRY_S)  # libvirt may be there, and something else be in the way
                await self._slot.wait_connected(60.0)
            else:
                await self.change(
                    state=FAILED, message="it could not be prepared; nothing is left of it", never_ran=True
                )

    def _stop_watching(self) -> None:
        if self._guard is not None:
            self._guard.cancel()
            self._guard = None

    async def _destroy(self) -> None:
        was_starting = await self._stop_starting()
        listens = not was_starting and not self._hangs
        await end_domain(self._slot, self.record.domain_uuid, self.record.domain_name, listens=listens)
        self._slot.forget(self.record.domain_uuid)
        self._sockets.remove(self.record.migration_id)
        await each((companion.undo() for companion in self.companions), self.log)

    async def _undo_create(self) -> None:
        try:
            await self._destroy()
        except HandoffError as error:
            self.left_behind = True
            self.log.error("the incoming domain may be left; it is removed when libvirt answers", error=error.message)


async def _resumed(events: Subscription, wait_s: float) -> MonitorEvent | None:
    """The RESUME event, if it has come or comes in time."""
    deadline = time.monotonic() + wait_s
    while True:
        event = await events.next_within(max(0.0, deadline - time.monotonic()))
        match event:
            case None | ConnectionEvent():
                return None
            case MonitorEvent(event="RESUME"):
                return event
            case _ if _is_end(event):
                return None


def _is_end(event: Event) -> bool:
    return isinstance(event, LifecycleEvent) and event.kind in ("stopped", "crashed")


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
