"""Which migrations may begin. Pure.

A guest has one migration at a time (a transaction in etcd sees to that); here the links between hosts are shared out.
"""

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from handoff.controller.v1.migrations_pb2 import Migration
from handoff_controller.machine import FINAL, State, state_of
from handoff_controller.settings import AdmissionSettings


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a planned migration may begin now, and what it waits for if not."""

    admitted: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Limit:
    name: str
    value: int


def _limit(pair: frozenset[str], settings: AdmissionSettings) -> _Limit:
    """An upgrade stays on its host: no link is shared, but its processors and its memory are."""
    if len(pair) == 1:
        return _Limit("max_upgrades_per_host", settings.max_upgrades_per_host)
    return _Limit("max_parallel_per_pair", settings.max_parallel_per_pair)


def _pair(migration: Migration) -> frozenset[str]:
    return frozenset({migration.source.host, migration.destination.host})


def admit(
    migrations: Sequence[Migration], settings: AdmissionSettings, admitted: Container[str] = ()
) -> Mapping[str, Verdict]:
    """Judges every planned migration, by id, first come first served.

    Those that have begun hold their place between their two hosts, whichever way they go, until they are final; so do
    those `admitted` already, whose records still say PLANNED for a moment.
    """
    busy: Counter[frozenset[str]] = Counter()
    holders: dict[frozenset[str], str] = {}
    for migration in migrations:
        begun = migration.id in admitted or state_of(migration) is not State.PLANNED
        if begun and state_of(migration) not in FINAL:
            busy[_pair(migration)] += 1
            holders.setdefault(_pair(migration), migration.id)
    verdicts: dict[str, Verdict] = {}
    for migration in sorted(migrations, key=lambda one: (one.create_time.ToNanoseconds(), one.id)):
        if state_of(migration) is not State.PLANNED or migration.id in admitted:
            continue
        pair = _pair(migration)
        limit = _limit(pair, settings)
        if busy[pair] < limit.value:
            busy[pair] += 1
            holders.setdefault(pair, migration.id)
            verdicts[migration.id] = Verdict(admitted=True)
        else:
            where = f"between {' and '.join(sorted(pair))}" if len(pair) > 1 else f"on {min(pair)}"
            verdicts[migration.id] = Verdict(
                admitted=False,
                reason=f"{holders[pair]} is {'moving' if len(pair) > 1 else 'under way'} {where} "
                f"(admission.{limit.name} is {limit.value})",
            )
    return verdicts
