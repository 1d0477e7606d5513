"""Which migrations may be forgotten: etcd would grow for ever otherwise. Pure.

One that has ended is kept while it is young or among the newest, and as long as a host may still hold something of it:
its record is what tells what to do with that.
"""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

from handoff.controller.v1.guests_pb2 import Guest
from handoff.controller.v1.migrations_pb2 import Migration
from handoff_controller.machine import FINAL
from handoff_controller.settings import RetentionSettings

_FINAL = frozenset(state.value for state in FINAL)


def forgettable(
    migrations: Sequence[Migration],
    settings: RetentionSettings,
    now: datetime,
    configured: Collection[str],
    unsettled: Mapping[str, Collection[str]],
) -> tuple[Migration, ...]:
    """Those that nobody will miss, oldest first.

    `unsettled`: of each host that has just been seen whole, the migrations that its agent has not ended. Nothing is
    known of the other `configured` ones; a host that is not configured any more holds nothing back.
    """
    newest_first = sorted(migrations, key=lambda one: (one.create_time.ToNanoseconds(), one.id), reverse=True)
    return tuple(
        migration
        for migration in reversed(newest_first[settings.count :])
        if _is_old(migration, settings, now) and _is_settled(migration, configured, unsettled)
    )


def lost_for_long(guests: Sequence[Guest], settings: RetentionSettings, now: datetime) -> tuple[Guest, ...]:
    """Guests that were lost so long ago that it is not news any more; copies, no longer marked as lost."""
    found = []
    for guest in guests:
        if guest.loss.certain and now.timestamp() - guest.loss.time.ToMilliseconds() / 1000 > settings.age_s:
            changed = Guest()
            changed.CopyFrom(guest)
            changed.ClearField("loss")
            found.append(changed)
    return tuple(found)


def _is_old(migration: Migration, settings: RetentionSettings, now: datetime) -> bool:
    ended_s = migration.end_time.ToMilliseconds() / 1000
    return migration.state in _FINAL and now.timestamp() - ended_s > settings.age_s


def _is_settled(migration: Migration, configured: Collection[str], unsettled: Mapping[str, Collection[str]]) -> bool:
    hosts = {migration.source.host, migration.destination.host} & set(configured)
    return all(host in unsettled and migration.id not in unsettled[host] for host in hosts)
