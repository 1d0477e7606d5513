"""What both sides of a handoff do with a domain: look at it, run it, end it."""

import asyncio
import contextlib
import time
from typing import Final

import libvirt

from handoff_agent.monitor import Monitor
from handoff_agent.qemu_process import kill_qemu
from handoff_agent.slots import LibvirtFailure, Slot
from handoff_common.errors import DeadlineError, HandoffError, NotFoundError, PreconditionError

QUIT_TIMEOUT_S: Final = 1.0
END_TIMEOUT_S: Final = 20.0
RESUME_TIMEOUT_S: Final = 10.0
RESUME_RETRY_S: Final = 0.2
USER_TIMEOUT_S: Final = 1.0

_RUNNING_STATUSES: Final = ("running", "io-error", "watchdog", "guest-panicked", "suspended", "shutdown")
"""QEMU's run states in which a guest is not waiting for us."""

_WANTED_OFF: Final = (
    libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN,
    libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED,
    libvirt.VIR_DOMAIN_SHUTOFF_SAVED,
)

_UNDEFINE_FLAGS: Final = (
    libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM
    | libvirt.VIR_DOMAIN_UNDEFINE_KEEP_TPM
    | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
)


async def is_active(slot: Slot, uuid: str) -> bool:
    """The domain has a QEMU. Raises UnavailableError or DeadlineError when libvirtd can't tell."""
    try:
        return bool(await slot.on_domain(uuid, lambda domain: domain.isActive(), urgent=True))
    except NotFoundError:
        return False


async def was_shut_down(slot: Slot, uuid: str) -> bool:
    """A defined domain is off because the guest itself, or its user, wanted it so. Raises as Slot.call does."""
    try:
        state, reason = await slot.on_domain(uuid, lambda domain: domain.state())
    except NotFoundError:
        return False
    return state == libvirt.VIR_DOMAIN_SHUTOFF and reason in _WANTED_OFF


async def run_again(slot: Slot, uuid: str) -> bool:
    """Makes sure that the guest runs, after a transfer that ended here; tells whether it still has a QEMU.

    Raises PreconditionError when QEMU doesn't run it within 10 s, and UnavailableError or DeadlineError when libvirtd
    does not answer: then nothing is known.
    """
    deadline = time.monotonic() + RESUME_TIMEOUT_S
    monitor = Monitor(slot, uuid)
    refusal = "QEMU stays paused"
    with slot.events(uuid) as events:
        while await is_active(slot, uuid):
            if await is_running(monitor):
                return True
            if time.monotonic() > deadline:
                raise PreconditionError(f"domain {uuid} does not resume ({refusal}); try virsh resume")
            try:
                await slot.on_domain(uuid, lambda domain: domain.resume(), urgent=True)
            except (PreconditionError, NotFoundError, LibvirtFailure) as error:
                # "already running" when QEMU was faster; other refusals of a moment pass.
                refusal = error.message
            await events.next_within(RESUME_RETRY_S)
    return False


async def is_running(monitor: Monitor) -> bool:
    """The guest is not paused, or for reasons of its own. Raises as Monitor.execute does."""
    return await monitor.query_status(urgent=True) in _RUNNING_STATUSES


async def user_runs_it(slot: Slot, uuid: str) -> bool | None:
    """Whether its user lets the guest run, or has paused it; None when it is QEMU that has paused it for a migration.

    Raises as Monitor.execute does.
    """
    status = await Monitor(slot, uuid).query_status(timeout_s=USER_TIMEOUT_S, urgent=True)
    if status in ("running", "paused"):
        return status == "running"
    # "finish-migrate" is QEMU's own, but follows soon where there is a migration and a user has paused the guest.
    state, reason = await slot.on_domain(uuid, lambda domain: domain.state(), USER_TIMEOUT_S, urgent=True)
    by_user: bool = state == libvirt.VIR_DOMAIN_PAUSED and reason == libvirt.VIR_DOMAIN_PAUSED_USER
    return False if by_user else None


async def end_domain(slot: Slot, uuid: str, name: str, *, listens: bool = True) -> None:
    """Ends the domain's QEMU, at once, without asking the guest; does nothing when there is none.

    A QEMU that `listens` on its monitor is told to quit first: libvirt's destroy sends a signal and looks again only
    after 200 ms. One that does not is killed. Raises UnavailableError or DeadlineError when libvirtd does not answer;
    LibvirtFailure when QEMU can't be killed.
    """
    if listens:
        try:
            await Monitor(slot, uuid).execute("quit", timeout_s=QUIT_TIMEOUT_S, urgent=True)
        except DeadlineError:
            listens = False
        except HandoffError:
            pass
    if not listens:
        await asyncio.to_thread(kill_qemu, slot.uri, name, uuid)
    try:
        await slot.on_domain(uuid, lambda domain: domain.destroy(), END_TIMEOUT_S, urgent=True)
    except (NotFoundError, PreconditionError):
        return
    except LibvirtFailure:
        # libvirt gives up on a process in uninterruptible sleep, and may lose the race with QEMU's own end.
        if await is_active(slot, uuid):
            raise


async def undefine(slot: Slot, uuid: str) -> None:
    """Removes the definition, if there is one; NVRAM and TPM state stay where they are. Raises as Slot.call does."""
    with contextlib.suppress(NotFoundError):
        await slot.on_domain(uuid, _undefine_persistent)
    slot.forget(uuid)


def _undefine_persistent(domain: libvirt.virDomain) -> None:
    if domain.isPersistent():
        domain.undefineFlags(_UNDEFINE_FLAGS)
