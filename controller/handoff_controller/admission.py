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
        if busy[pair] < settings.max_parallel_per_pair:
            busy[pair] += 1
            holders.setdefault(pair, migration.id)
            verdicts[migration.id] = Verdict(admitted=True)
        else:
            hosts = " and ".join(sorted(pair))
            verdicts[migration.id] = Verdict(
                admitted=False,
                reason=f"{holders[pair]} is moving between {hosts} "
                f"(admission.max_parallel_per_pair is {settings.max_parallel_per_pair})",
            )
    return verdicts
