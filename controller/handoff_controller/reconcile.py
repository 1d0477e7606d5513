"""What a host's report of its domains means for the records of guests. Pure.

Outside of a migration the fleet is the truth and the records follow it; within one, the record is.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from handoff.agent.v1.types_pb2 import Domain, DomainState
from handoff.controller.v1.guests_pb2 import Guest
from handoff.controller.v1.migrations_pb2 import Placement

ACTIVE = frozenset({DomainState.DOMAIN_STATE_RUNNING, DomainState.DOMAIN_STATE_PAUSED, DomainState.DOMAIN_STATE_OTHER})


@dataclass(frozen=True, slots=True)
class Changes:
    """Guest records to write and to forget."""

    written: tuple[Guest, ...]
    forgotten: tuple[Guest, ...]


def reconcile(
    host: str, domains: Sequence[Domain], guests: Iterable[Guest], reported: Mapping[str, set[str]]
) -> Changes:
    """Compares the domains that `host` reports with the records.

    `reported`: for each host that answers, the UUIDs that it reported last. A guest that somebody moved by hand goes to
    the host that has it; one that two hosts have active, or two slots of one host, keeps its owner, and the other is
    noted as a conflict ("h2", "h1/b"); one that its owner no longer has is forgotten, unless it was lost there. A lost
    one that runs again is not lost any more.
    """
    known = {guest.uuid: guest for guest in guests}
    # In an upgrade, and while its old copy is not removed yet, both slots have it.
    here = {domain.uuid: domain for domain in sorted(domains, key=lambda one: _precedence(one, known.get(one.uuid)))}
    active = [(domain.uuid, domain.slot) for domain in domains if domain.state in ACTIVE and not domain.migration_id]
    written = [
        Guest(
            uuid=domain.uuid,
            name=domain.name,
            owner=Placement(host=host, slot=domain.slot),
            generation=1,
            conflicts=_other_slots(host, domain, active),
        )
        for domain in here.values()
        if domain.uuid not in known and not domain.migration_id
    ]
    forgotten: list[Guest] = []
    for guest in known.values():
        if guest.active_migration:
            continue
        domain = here.get(guest.uuid)
        if guest.owner.host != host:
            changed = _seen_elsewhere(guest, host, domain, reported)
        elif domain is not None:
            changed = _seen_at_owner(guest, host, domain, _other_slots(host, domain, active))
        elif any(guest.uuid in uuids for name, uuids in reported.items() if name != host):
            continue
        elif guest.HasField("loss"):
            changed = _certainly_lost(guest, f"{guest.name} is not on {host} any more")
        else:
            forgotten.append(guest)
            continue
        if changed != guest:
            written.append(changed)
    return Changes(tuple(written), tuple(forgotten))


def _precedence(domain: Domain, guest: Guest | None) -> tuple[bool, bool, bool]:
    """Of two domains of one guest the later one is the guest: one that runs, that is active, that is in its slot."""
    is_in_its_slot = guest is not None and guest.owner.slot == domain.slot
    return domain.state == DomainState.DOMAIN_STATE_RUNNING, domain.state in ACTIVE, is_in_its_slot


def _other_slots(host: str, domain: Domain, active: Iterable[tuple[str, str]]) -> list[str]:
    """Where else on this host the guest is active."""
    return sorted(f"{host}/{slot}" for uuid, slot in active if uuid == domain.uuid and slot != domain.slot)


def _seen_at_owner(guest: Guest, host: str, domain: Domain, other_slots: Sequence[str]) -> Guest:
    changed = Guest()
    changed.CopyFrom(guest)
    changed.name = domain.name
    changed.owner.slot = domain.slot
    if domain.state in ACTIVE:
        changed.ClearField("loss")
    elif guest.HasField("loss"):
        changed = _certainly_lost(changed, f"{guest.name} does not run on {host} any more")
    elsewhere = [other for other in guest.conflicts if other.partition("/")[0] != host]
    changed.conflicts[:] = [*elsewhere, *other_slots]
    return changed


def _certainly_lost(guest: Guest, reason: str) -> Guest:
    changed = Guest()
    changed.CopyFrom(guest)
    if not guest.loss.certain:
        changed.loss.certain = True
        changed.loss.reason = f"{reason}; before, {guest.loss.reason}"
    return changed


def _seen_elsewhere(guest: Guest, host: str, domain: Domain | None, reported: Mapping[str, set[str]]) -> Guest:
    changed = Guest()
    changed.CopyFrom(guest)
    changed.conflicts[:] = [other for other in guest.conflicts if other != host]
    if domain is None or domain.state not in ACTIVE or domain.migration_id:
        return changed
    owner_lacks_it = guest.owner.host in reported and guest.uuid not in reported[guest.owner.host]
    if owner_lacks_it:
        changed.owner.CopyFrom(Placement(host=host, slot=domain.slot))
        changed.generation += 1
        changed.ClearField("loss")
    else:
        changed.conflicts.append(host)
    return changed
