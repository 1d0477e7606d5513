"""The leader's work on rollouts: looks at each that is not final, and does what rollout.py decides."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Final

import structlog

from handoff.agent.v1.types_pb2 import DomainState
from handoff.controller.v1.guests_pb2 import Guest
from handoff.controller.v1.migrations_pb2 import CreateUpgradeRequest, Migration
from handoff.controller.v1.rollouts_pb2 import CreateRolloutRequest, Rollout, RolloutGuest
from handoff_common.errors import (
    ConflictError,
    DeadlineError,
    HandoffError,
    InvalidArgumentError,
    PreconditionError,
    UnavailableError,
)
from handoff_controller.agents import Agents
from handoff_controller.planner import REQUEST_ID, with_defaults
from handoff_controller.rollout import FINAL, Look, Phase, Turn, decide, phase_of, refused, turn_of
from handoff_controller.store import Store
from handoff_controller.upgrade_planner import choose_build

log = structlog.get_logger()

CreateUpgrade = Callable[[CreateUpgradeRequest], Awaitable[Migration]]

MOST_PARALLEL: Final = 16
# Room for "-g" and the guest's number in the ids of the upgrades.
LONGEST_ID: Final = 56
LOOK_EVERY_S: Final = 0.5
IDLE_LOOK_EVERY_S: Final = 5.0
PASSING: Final = (ConflictError, UnavailableError, DeadlineError)


class Rollouts:
    """All rollouts, for one term. `run` it; the other methods may be called while it runs."""

    def __init__(self, store: Store, agents: Agents, create_upgrade: CreateUpgrade) -> None:
        self._store = store
        self._agents = agents
        self._create_upgrade = create_upgrade
        self._lock = asyncio.Lock()
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Goes on with every rollout until cancelled. Raises StaleTermError when we don't lead any more."""
        while True:
            self._changed.clear()
            busy = False
            try:
                for rollout in await self._store.rollouts():
                    if _is_active(rollout):
                        busy = True
                        await self._advance(rollout.id)
            except PASSING as error:
                log.warning("a look at the rollouts failed", error=error.message)
            try:
                await asyncio.wait_for(self._changed.wait(), LOOK_EVERY_S if busy else IDLE_LOOK_EVERY_S)
            except TimeoutError:
                continue

    async def create(self, request: CreateRolloutRequest) -> Rollout:
        """Records a rollout of the guests that the host runs now; see CreateRollout for what it raises."""
        if request.request_id and (known := await self._store.find_rollout(request.request_id)) is not None:
            return known
        _check(request)
        build = choose_build(await self._agents[request.host].get_host(), request.release)
        now = datetime.now(UTC)
        rollout = Rollout(
            id=request.request_id or f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
            host=request.host,
            release=build.name,
            parallel=request.parallel or 1,
            keep_going=request.keep_going,
            options=with_defaults(request.options),
            state=Phase.RUNNING.value,
        )
        rollout.create_time.FromDatetime(now)
        async with self._lock:
            for other in await self._store.rollouts():
                if other.host == request.host and _is_active(other):
                    raise PreconditionError(
                        f"rollout {other.id} is at work on {other.host}: wait for it "
                        f"(`handoff rollout {other.id} --watch`) or cancel it"
                    )
            # The agent itself is asked: a guest that was started a moment ago is not in the records yet.
            for domain in sorted(await self._agents[request.host].list_domains(), key=lambda domain: domain.name):
                if domain.state in (DomainState.DOMAIN_STATE_RUNNING, DomainState.DOMAIN_STATE_PAUSED):
                    rollout.guests.append(RolloutGuest(uuid=domain.uuid, name=domain.name, state=Turn.PENDING.value))
            rollout = await self._store.put_rollout(rollout)
        self._changed.set()
        log.info("rollout", rollout=rollout.id, host=rollout.host, release=rollout.release, guests=len(rollout.guests))
        return rollout

    async def cancel(self, beginning: str) -> Rollout:
        """Records the wish. Raises NotFoundError, or PreconditionError when it has ended."""
        async with self._lock:
            rollout = await self._store.rollout(beginning)
            if phase_of(rollout) in FINAL:
                raise PreconditionError(f"rollout {rollout.id} is {phase_of(rollout).name} already")
            if not rollout.cancel_requested:
                rollout.cancel_requested = True
                rollout = await self._store.put_rollout(rollout)
        self._changed.set()
        return rollout

    async def _advance(self, rollout_id: str) -> None:
        async with self._lock:
            rollout = await self._store.find_rollout(rollout_id)
            if rollout is None or not _is_active(rollout):
                return
            decision = decide(rollout, await self._look(rollout), at=datetime.now(UTC))
            rollout = await self._saved(rollout, decision.rollout)
        if decision.create:
            # Not under the lock: a cancel needs not wait for agents that are slow to answer.
            outcomes = await asyncio.gather(*(self._begin(rollout, upgrade) for upgrade in decision.create))
            await self._note(rollout.id, dict(zip(decision.create, outcomes, strict=True)))

    async def _begin(self, rollout: Rollout, migration_id: str) -> tuple[Turn, str] | None:
        """Creates a guest's upgrade; None when it is there, else what becomes of the guest, and why."""
        (guest,) = (guest for guest in rollout.guests if guest.migration_id == migration_id)
        request = CreateUpgradeRequest(
            guest=guest.uuid, release=rollout.release, options=rollout.options, request_id=migration_id
        )
        try:
            await self._create_upgrade(request)
        except PASSING as error:
            return Turn.UPGRADING, error.message
        except InvalidArgumentError as error:  # it runs under that build already
            return Turn.SKIPPED, error.message
        except HandoffError as error:
            if await self._store.find_migration(migration_id) is not None:
                return None
            return Turn.FAILED, error.message
        return None

    async def _note(self, rollout_id: str, outcomes: dict[str, tuple[Turn, str] | None]) -> None:
        async with self._lock:
            rollout = await self._store.find_rollout(rollout_id)
            if rollout is None:
                return
            changed = rollout
            for migration_id, outcome in outcomes.items():
                if outcome is not None:
                    changed = refused(changed, migration_id, *outcome)
            await self._saved(rollout, changed)

    async def _look(self, rollout: Rollout) -> Look:
        ids = [guest.migration_id for guest in rollout.guests if turn_of(guest) is Turn.UPGRADING]
        upgrades = [await self._store.find_migration(migration_id) for migration_id in ids]
        domains = {
            domain.uuid: domain
            for host in await self._store.hosts()
            if host.name == rollout.host
            for domain in host.domains
        }
        guests: dict[str, Guest] = {}
        for guest in await self._store.guests():
            if guest.uuid in domains:
                guest.domain.CopyFrom(domains[guest.uuid])
            guests[guest.uuid] = guest
        unknown = {guest.uuid for guest in rollout.guests if turn_of(guest) is Turn.PENDING} - set(guests)
        unrecorded: frozenset[str] = frozenset()
        if unknown:
            running = {domain.uuid for domain in await self._agents[rollout.host].list_domains()}
            unrecorded = frozenset(unknown & running)
        return Look({upgrade.id: upgrade for upgrade in upgrades if upgrade is not None}, guests, unrecorded)

    async def _saved(self, before: Rollout, after: Rollout) -> Rollout:
        if after == before:
            return before
        saved = await self._store.put_rollout(after)
        if before.state != after.state:
            log.info("rollout", rollout=after.id, state=phase_of(after).name, reason=after.reason)
        self._changed.set()
        return saved


def _is_active(rollout: Rollout) -> bool:
    try:
        return phase_of(rollout) not in FINAL
    except ValueError:  # written by a newer release: it waits for one
        return False


def _check(request: CreateRolloutRequest) -> None:
    if not request.host:
        raise InvalidArgumentError("no host given; `handoff hosts` lists them")
    if request.request_id and (not REQUEST_ID.fullmatch(request.request_id) or len(request.request_id) > LONGEST_ID):
        raise InvalidArgumentError(f"request_id: letters, digits and dashes, at most {LONGEST_ID}")
    if request.parallel > MOST_PARALLEL:
        raise InvalidArgumentError(f"{request.parallel} guests at one time: {MOST_PARALLEL} at most")
