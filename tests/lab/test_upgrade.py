"""A running guest gets another QEMU on its own host, back and forth; one that fails leaves it where it was."""

import asyncio
import os
import signal
import subprocess

import grpc
import grpc.aio
import pytest
from moves import CALL_S, OBSERVER, Moves, Subject, story, unsettled

from handoff.agent.v1.qemu_pb2 import TransferMethod
from handoff.controller.v1.migrations_pb2 import CreateUpgradeRequest, Migration, MigrationOptions
from handoff_controller.machine import State, state_of
from handoff_lab.guest import Guests, virsh
from handoff_lab.host import Host, program
from handoff_lab.probe import TcpSession, UdpProbe

pytestmark = pytest.mark.lab

CPR, COPY = TransferMethod.TRANSFER_METHOD_CPR, TransferMethod.TRANSFER_METHOD_UNIX


async def upgrade(subject: Subject, release: str, options: MigrationOptions | None = None) -> Migration:
    """Asks for an upgrade; raises AioRpcError when it is refused."""
    request = CreateUpgradeRequest(guest=subject.name, release=release, options=options or MigrationOptions())
    return (await subject.moves.api().CreateUpgrade(request, timeout=CALL_S)).migration


async def upgrade_once_reached(subject: Subject, release: str) -> Migration:
    """Asks until the controller has found an agent again that was restarted."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await upgrade(subject, release)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
            await asyncio.sleep(0.2)


async def must_be_in(subject: Subject, slot: str, release: str) -> None:
    """It runs in that slot under that build; the other slot knows nothing of it, and nothing is left."""
    home = await subject.host()
    await subject.must_be_at(home)
    seen = await asyncio.to_thread(Guests(subject.fleet).find, subject.name)
    assert [(one.host, one.slot, one.state) for one in seen] == [(home, slot, "running")]
    record = await subject.moves.guest(subject.name)
    assert record.owner.slot == slot
    assert record.domain.emulator_name == release
    assert not await unsettled(subject.fleet, home)
    run = Host(subject.fleet.lab, int(home.removeprefix("h"))).directory / "run/handoff/handoffs"
    assert not run.exists() or not list(run.iterdir())


async def test_there_and_back_without_a_copy(subject: Subject) -> None:
    """To a rebuild of the same release and back by cpr: memory, disk and TCP survive."""
    await subject.inside.dirty(16, 8)
    await subject.inside.journal_start(1, 16)
    node = subject.fleet.node(OBSERVER)
    async with TcpSession(node, subject.record.ip) as session:
        for slot, release in (("b", "10.0-rebuilt"), ("a", "10.0")):
            async with UdpProbe(subject.fleet.lab, node, subject.record.ip) as probe:
                migration = await subject.moves.ends((await upgrade(subject, release)).id)
                udp = await probe.stop()
            assert state_of(migration) is State.DONE, story(migration)
            assert list(migration.warnings) == []
            await must_be_in(subject, slot, release)
            outcome = migration.outcome
            print(f"{release}: {outcome.total_ms} ms, pause {outcome.downtime_ms:.0f} ms, {udp.longest_gap}")
            assert migration.method == CPR
            assert 0 < outcome.ram_bytes < 1 << 20
            assert udp.duplicated == 0, udp
    assert session.result().survived, session.result()


async def test_the_command_and_its_refusals(subject: Subject) -> None:
    environment = subject.fleet.environment()

    def handoff(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(program("handoff")), *arguments]
        return subprocess.run(command, env=environment, text=True, capture_output=True, check=False, timeout=120)

    done = await asyncio.to_thread(handoff, "upgrade", subject.name, "--to", "10.0-rebuilt", "--wait")
    assert done.returncode == 0, done
    assert "under QEMU build 10.0-rebuilt" in done.stdout
    await must_be_in(subject, "b", "10.0-rebuilt")
    for release, why in (("10.0-rebuilt", "already"), ("9.9", "has no QEMU build 9.9"), ("7.2", "no machine type")):
        refused = await asyncio.to_thread(handoff, "upgrade", subject.name, "--to", release)
        assert refused.returncode != 0
        assert why in refused.stderr, refused.stderr
    moved = await asyncio.to_thread(handoff, "migrate", subject.name, "--to", "h2", "--wait")
    assert moved.returncode == 0, moved
    await must_be_in(subject, "a", "10.0-rebuilt")


async def test_a_slot_without_libvirtd_is_said(subject: Subject) -> None:
    daemon = subject.fleet.host("h1").daemons()["libvirtd-b"]
    daemon.stop()
    try:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async with asyncio.timeout(10):
                await upgrade(subject, "10.0-rebuilt")
        assert refused.value.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAVAILABLE)
        assert "slot b" in (refused.value.details() or "")
    finally:
        daemon.start()


async def test_a_new_qemu_that_is_killed(subject: Subject, moves: Moves) -> None:
    """The guest runs on under the old one."""
    migration = await upgrade(subject, "10.0-rebuilt")
    await moves.reaches(migration.id, State.COPYING)
    os.kill(new_qemu(subject), signal.SIGKILL)
    migration = await moves.ends(migration.id)
    assert state_of(migration) is State.ABORTED, story(migration)
    await must_be_in(subject, "a", "10.0")


async def test_a_new_qemu_that_crashes_at_start(subject: Subject, moves: Moves) -> None:
    """It is found out before the guest is touched, and the upgrade ends with what libvirt said."""
    host = subject.fleet.host("h1")
    first = subject.fleet.lab.release()
    crashes = host.directory / "crashes"
    crashes.write_text(f'#!/bin/sh\ncase "$*" in *-incoming*) exit 1;; esac\nexec {first.emulator} "$@"\n')
    crashes.chmod(0o755)
    settings = host.directory / "etc/handoff/agent.toml"
    before = settings.read_text()
    settings.write_text(f'{before}\n[[emulators]]\nname = "crashes"\npath = "{crashes}"\n')
    try:
        await asyncio.to_thread(subject.fleet.restart, "h1", "agent")
        migration = await moves.ends((await upgrade_once_reached(subject, "crashes")).id)
        assert state_of(migration) is State.ABORTED, story(migration)
        assert "can't be started here" in migration.error
        assert migration.outcome.downtime_ms == 0
        await must_be_in(subject, "a", "10.0")
    finally:
        settings.write_text(before)
        await asyncio.to_thread(subject.fleet.restart, "h1", "agent")


async def test_a_new_qemu_that_does_not_resume(subject: Subject, moves: Moves) -> None:
    """Frozen when the guest is committed to it, it is not told to run: it is killed, and the old one goes on."""
    etcd = subject.fleet.daemon("etcd1", "etcd")
    async with TcpSession(subject.fleet.node(OBSERVER), subject.record.ip) as session:
        migration = await upgrade(subject, "10.0-rebuilt")
        await moves.reaches(migration.id, State.SWITCHING)
        etcd.signal(signal.SIGSTOP)
        try:
            async with asyncio.timeout(5):
                while f"{migration.id} HANDOFF_STATE_HELD" not in await unsettled(subject.fleet, "h1"):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            os.kill(new_qemu(subject), signal.SIGSTOP)
        finally:
            etcd.signal(signal.SIGCONT)
        migration = await moves.ends(migration.id)
        assert state_of(migration) is State.ABORTED, story(migration)
        assert State.COMMITTED in [State(change.state) for change in migration.timeline]
        assert "does not answer, and was not told to run" in migration.error
        await must_be_in(subject, "a", "10.0")
    assert session.result().survived, session.result()


def new_qemu(subject: Subject) -> int:
    """Process id of the guest's QEMU in slot b of h1."""
    host = subject.fleet.host("h1")
    pid = host.node.find(int((host.directory / f"run/handoff/slots/b/qemu/{subject.name}.pid").read_text()))
    assert pid is not None
    return pid


LOCAL_DISK = ("size=64M,format=qcow2,place=local",)


async def test_to_a_newer_release(moves: Moves, guests: Guests) -> None:
    """7.2 to 10.0 by copy, with a local disk; the next cold boot uses 10.0 too."""
    subject = await Subject.create(moves, "old", "h1", disks=LOCAL_DISK, release="7.2")
    host = subject.fleet.host("h1")
    # 7.2 without hardware help loses writes of a guest that runs while it is copied, also those of one at rest.
    await asyncio.to_thread(virsh, host, "a", "suspend", subject.name)
    migration = await moves.ends((await upgrade(subject, "10.0")).id)
    await asyncio.to_thread(virsh, host, "b", "resume", subject.name)
    assert state_of(migration) is State.DONE, story(migration)
    assert list(migration.warnings) == []
    assert migration.method == COPY
    assert "7.2" in migration.plan
    await must_be_in(subject, "b", "10.0")
    await asyncio.to_thread(virsh, host, "b", "destroy", subject.name)
    await asyncio.to_thread(virsh, host, "b", "start", subject.name)
    await asyncio.to_thread(guests.wait_ready, subject.record)
    version = await asyncio.to_thread(virsh, host, "b", "qemu-monitor-command", "--hmp", subject.name, "info version")
    assert version.startswith("10.0")


async def test_back_to_an_older_release(moves: Moves, guests: Guests) -> None:
    """10.0 to 7.2 by copy, for a machine type that both know."""
    subject = await Subject.create(moves, "old", "h1", disks=LOCAL_DISK, machine="pc-q35-7.2")
    async with TcpSession(subject.fleet.node(OBSERVER), subject.record.ip) as session:
        migration = await moves.ends((await upgrade(subject, "7.2")).id)
        assert state_of(migration) is State.DONE, story(migration)
        assert migration.method == COPY
        assert "7.2" in migration.plan
        await must_be_in(subject, "b", "7.2")
    assert session.result().survived, session.result()


@pytest.mark.parametrize("state", [State.PREPARING, State.COPYING, State.SWITCHING], ids=lambda state: state.name)
async def test_cancel(subject: Subject, moves: Moves, state: State) -> None:
    migration = await upgrade(subject, "10.0-rebuilt")
    await moves.reaches(migration.id, state)
    try:
        await moves.cancel(migration.id)
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    migration = await moves.ends(migration.id)
    if state_of(migration) is State.DONE:
        await must_be_in(subject, "b", "10.0-rebuilt")
    else:
        await must_be_in(subject, "a", "10.0")
