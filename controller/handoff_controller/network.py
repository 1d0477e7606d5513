"""Where every tenant's port of the fleet is, and what each host is told of it. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from handoff.agent.v1.flow_pb2 import NetworkPort
from handoff.agent.v1.types_pb2 import Domain
from handoff.controller.v1.guests_pb2 import Guest
from handoff.controller.v1.hosts_pb2 import Host
from handoff.controller.v1.migrations_pb2 import Migration
from handoff_controller.settings import StaticPortSettings

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class FabricPort:
    """A port of a tenant, wherever it is."""

    tunnel: int
    mac: str
    ips: tuple[str, ...]
    tunnel_address: str
    """Of the host that it is on."""
    arriving_at: str = ""
    """Of the host that its guest is being moved to."""
    any_source: bool = False
    domain_uuid: str = ""
    name: str = ""


class FabricView:
    """Makes the fabric of the records. Remembers guests' ports: a report without one takes nobody off the network."""

    def __init__(self, static_ports: Sequence[StaticPortSettings]) -> None:
        self._static_ports = static_ports
        self._known: dict[str, Domain] = {}

    def ports(
        self, hosts: Iterable[Host], guests: Iterable[Guest], moving: Mapping[str, Migration]
    ) -> tuple[FabricPort, ...]:
        """All ports, sorted. `moving`: the migration of each guest that has one, by UUID."""
        by_name = {host.name: host for host in hosts}
        addresses = {name: host.detail.tunnel_address for name, host in by_name.items() if host.detail.tunnel_address}
        found = [port for each in self._static_ports if (port := _static(each, addresses)) is not None]
        known = {}
        for guest in guests:
            domain = _domain(guest, by_name) or self._known.get(guest.uuid)
            if domain is None:
                continue
            known[guest.uuid] = domain
            found.extend(_of_guest(guest, domain, addresses, moving.get(guest.uuid)))
        self._known = known
        return _without_doubles(found)


def told_to(tunnel_address: str, ports: Iterable[FabricPort]) -> list[NetworkPort]:
    """The fabric as the host with this tunnel endpoint is told of it: what is there has no address."""
    return [
        NetworkPort(
            mac=port.mac,
            tunnel=port.tunnel,
            ips=port.ips,
            any_source=port.any_source,
            tunnel_address=_unless(tunnel_address, port.tunnel_address),
            arriving_at=_unless(tunnel_address, port.arriving_at),
            domain_uuid=port.domain_uuid,
            name=port.name,
        )
        for port in ports
    ]


def _unless(own: str, address: str) -> str:
    return "" if address == own else address


def _domain(guest: Guest, hosts: Mapping[str, Host]) -> Domain | None:
    """The guest's domain as a host reports it: its owner, or one that it comes from or goes to."""
    owner = hosts.get(guest.owner.host)
    for host in [*([owner] if owner is not None else []), *hosts.values()]:
        for domain in host.domains:
            if domain.uuid == guest.uuid:
                return domain
    return None


def _of_guest(
    guest: Guest, domain: Domain, addresses: Mapping[str, str], migration: Migration | None
) -> Iterable[FabricPort]:
    address = addresses.get(guest.owner.host)
    if address is None:
        return
    arriving_at = addresses.get(migration.destination.host, "") if migration is not None else ""
    for interface in domain.interfaces:
        if interface.tunnel:
            yield FabricPort(
                tunnel=interface.tunnel,
                mac=interface.mac,
                ips=tuple(interface.ips),
                tunnel_address=address,
                arriving_at=_unless(address, arriving_at),
                domain_uuid=guest.uuid,
                name=guest.name,
            )


def _static(settings: StaticPortSettings, addresses: Mapping[str, str]) -> FabricPort | None:
    address = addresses.get(settings.host) if settings.host else str(settings.vtep)
    if address is None:
        return None
    return FabricPort(
        tunnel=settings.tunnel,
        mac=settings.mac.lower(),
        ips=tuple(map(str, settings.ips)),
        tunnel_address=address,
        any_source=settings.any_source,
        name=settings.interface or f"{settings.mac} at {settings.vtep}",
    )


def _without_doubles(ports: Iterable[FabricPort]) -> tuple[FabricPort, ...]:
    """Of two ports with one MAC in one network, or of an address that two have, the first keeps it."""
    kept: dict[tuple[int, str], FabricPort] = {}
    holders: dict[tuple[int, str], FabricPort] = {}
    for port in ports:
        other = kept.get((port.tunnel, port.mac)) or next(
            (holders[port.tunnel, ip] for ip in port.ips if (port.tunnel, ip) in holders), None
        )
        if other is not None:
            log.warning("two ports of one network have the same address", kept=other.name, left_out=port.name)
            continue
        kept[port.tunnel, port.mac] = port
        holders.update({(port.tunnel, ip): port for ip in port.ips})
    return tuple(port for _, port in sorted(kept.items()))
