"""A guest goes from one slot of its host to the other: two real libvirtds, one agent, QEMU 10."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import libvirt
import pytest
from builds import Builds
from one_host import CPR, UNIX, Upgrade, remove, upgrading

from handoff.agent.v1 import qemu_pb2 as pb
from handoff_agent.rules import (
    ACTIVE,
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
from handoff_common.errors import NotFoundError, PreconditionError

METHODS = pytest.mark.parametrize("method", [UNIX, CPR], ids=["copy", "cpr"])


@pytest.fixture
async def upgrade(libvirtd: str, other_libvirtd: str, builds: Builds, tmp_path: Path) -> AsyncIterator[Upgrade]:
    async with upgrading((libvirtd, other_libvirtd), builds, tmp_path) as found:
        yield found


@METHODS
async def test_a_guest_gets_its_new_qemu(upgrade: Upgrade, method: pb.TransferMethod.ValueType) -> None:
    await upgrade.advance(method, HELD)
    destination = upgrade.handoffs.destination(upgrade.id, Call.ACTIVATE)
    await destination.activate()
    assert destination.state == ACTIVE, destination.record.message
    source = upgrade.handoffs.source(upgrade.id, Call.RELEASE)
    await asyncio.gather(source.release(), destination.finalize())
    assert (source.state, destination.state) == (RELEASED, FINALIZED)
    await upgrade.is_only_in("b")

    def definition(domain: libvirt.virDomain) -> tuple[int, str]:
        return domain.autostart(), domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)

    autostart, persistent = await upgrade.slots["b"].on_domain(upgrade.guest, definition)
    assert autostart == 1
    assert upgrade.paths["new"] in persistent
    assert "incoming" not in persistent
    assert "aux-ram-share=on" in persistent
    left = source.to_message()
    assert left.switch_timings.paused_to_held_ms > 0
    if method == CPR:
        assert left.progress.ram_transferred_bytes < 1 << 20


@METHODS
@pytest.mark.parametrize("stage", [PREPARED, TRANSFERRING, READY, SWITCHING, HELD], ids=pb.HandoffState.Name)
async def test_an_abort_leaves_the_guest_as_it_was(
    upgrade: Upgrade, method: pb.TransferMethod.ValueType, stage: State
) -> None:
    await upgrade.advance(method, stage)
    await upgrade.abort()
    await upgrade.is_only_in("a")
    assert await upgrade.slots["a"].on_domain(upgrade.guest, lambda domain: domain.autostart()) == 1
    upgrade.id += "-again"
    await upgrade.advance(method, HELD)
    await upgrade.handoffs.destination(upgrade.id, Call.ACTIVATE).activate()
    assert await upgrade.status("b") == "running"


@METHODS
async def test_the_guest_runs_until_the_switch_is_ordered(
    upgrade: Upgrade, method: pb.TransferMethod.ValueType
) -> None:
    await upgrade.advance(method, READY)
    with upgrade.slots["a"].events(upgrade.guest) as events:
        assert await events.next_within(2.0) is None
    assert await upgrade.status("a") == "running"


@METHODS
async def test_a_build_that_does_not_start_changes_nothing(
    upgrade: Upgrade, method: pb.TransferMethod.ValueType
) -> None:
    with pytest.raises(PreconditionError, match="can't be started here"):
        await upgrade.prepare(method, "crash")
    await upgrade.handoffs.abort(upgrade.id, SOURCE, "the test says so")
    await upgrade.is_only_in("a")


@METHODS
@pytest.mark.parametrize("stage", [PREPARED, TRANSFERRING, READY], ids=pb.HandoffState.Name)
async def test_a_new_qemu_that_dies_leaves_the_guest_running(
    upgrade: Upgrade, method: pb.TransferMethod.ValueType, stage: State
) -> None:
    await upgrade.advance(method, stage)
    with contextlib.suppress(NotFoundError):  # one that was just being started is gone before libvirt answers
        await upgrade.slots["b"].on_domain(upgrade.guest, lambda domain: domain.destroy())
    source = upgrade.handoffs.source(upgrade.id, Call.SWITCH_OVER)
    if stage != PREPARED:
        with contextlib.suppress(PreconditionError):
            await source.switch_over()
        failed = await upgrade.until(FAILED)
        assert failed.state == FAILED
    await upgrade.abort()
    await upgrade.is_only_in("a")


@METHODS
async def test_a_new_qemu_that_freezes_in_the_pause_is_left(
    upgrade: Upgrade, method: pb.TransferMethod.ValueType
) -> None:
    await upgrade.advance(method, READY)
    source = upgrade.handoffs.source(upgrade.id, Call.SWITCH_OVER)
    pid = upgrade.new_qemu()
    if method == UNIX:
        # With a full socket before it the old one can't end what it sends.
        os.kill(pid, signal.SIGSTOP)
        await source.switch_over()
    else:
        await source.switch_over()
        os.kill(pid, signal.SIGSTOP)
    try:
        state = (await upgrade.until(HELD)).state
        assert method == CPR or state == FAILED
        await upgrade.handoffs.abort(upgrade.id, SOURCE, "the test says so")
        assert await upgrade.status("a") == "running"
    finally:
        os.kill(pid, signal.SIGCONT)
    await upgrade.abort()
    await upgrade.is_only_in("a")


async def test_a_new_qemu_that_hangs_is_not_told_to_run(upgrade: Upgrade) -> None:
    await upgrade.advance(CPR, HELD)
    pid = upgrade.new_qemu()
    os.kill(pid, signal.SIGSTOP)
    destination = upgrade.handoffs.destination(upgrade.id, Call.ACTIVATE)
    await destination.activate()
    assert (destination.state, destination.record.never_ran) == (FAILED, True)
    await upgrade.abort()
    await upgrade.is_only_in("a")


@METHODS
async def test_a_new_qemu_that_dies_before_it_runs_gives_the_guest_back(
    upgrade: Upgrade, method: pb.TransferMethod.ValueType
) -> None:
    await upgrade.advance(method, HELD)
    await upgrade.slots["b"].on_domain(upgrade.guest, lambda domain: domain.destroy())
    destination = upgrade.handoffs.destination(upgrade.id, Call.ACTIVATE)
    await destination.activate()
    assert destination.to_message().never_ran
    await upgrade.abort()
    await upgrade.is_only_in("a")


@METHODS
@pytest.mark.parametrize("stage", [TRANSFERRING, READY, HELD], ids=pb.HandoffState.Name)
async def test_a_restarted_agent_takes_it_up(
    upgrade: Upgrade, method: pb.TransferMethod.ValueType, stage: State
) -> None:
    await upgrade.advance(method, stage)
    await upgrade.restart()
    if stage != HELD:
        assert (await upgrade.until(READY)).state == READY
        await upgrade.handoffs.source(upgrade.id, Call.SWITCH_OVER).switch_over()
    held = await upgrade.until(HELD)
    assert held.state == HELD, held.message
    await upgrade.handoffs.destination(upgrade.id, Call.ACTIVATE).activate()
    assert await upgrade.status("b") == "running"


async def test_a_device_that_the_release_lacks_is_refused(upgrade: Upgrade) -> None:
    _, guest = await upgrade.handoffs.prepare_source(upgrade.id, upgrade.guest, validate_only=True, local=True)
    assert "pcie-root-port" in guest.device_types
    guest.device_types.append("dropped-device")
    with pytest.raises(PreconditionError, match=f"{upgrade.paths['new']} on host h1 has no dropped-device"):
        await upgrade.handoffs.prepare_destination(
            upgrade.id, guest, "b", validate_only=True, method=CPR, emulator="new"
        )


async def test_memory_that_is_not_shared_can_not_be_passed_on(upgrade: Upgrade) -> None:
    slot = upgrade.slots["a"]
    await slot.on_domain(upgrade.guest, remove)
    slot.forget(upgrade.guest)
    await slot.call(lambda connection: upgrade.define(connection, shared=False))
    _, guest = await upgrade.handoffs.prepare_source(upgrade.id, upgrade.guest, validate_only=True, local=True)
    assert any("share=on" in reason for reason in guest.cpr_obstacles)
