"""Properties of the pipeline over whole fabrics: who gets a frame, at every moment of a move."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from hypothesis import given, settings
from hypothesis import strategies as st
from model_fabric import NORMAL, TUNNEL_PORT, Fabric, Guest, arp_request, frame, process

from handoff_agent.network.flow import Field, Output, PopVlan, PushVlan, ip_number, mac_number
from handoff_agent.network.pipeline import FROM_PORTS, Port, Tap, Tunnel, common_flows, mark, tenant_flows
from handoff_agent.network.treatment import HERE, Attachment, Key, Situation, treat

HOSTS = ("10.21.0.1", "10.21.0.2", "10.21.0.3")
TENANTS = (1001, 1002)
BROADCAST = "ff:ff:ff:ff:ff:ff"
NEW_TAP = 500


class Moment(Enum):
    """Of a move, as the hosts see it."""

    AT_REST = auto()
    STAGED = auto()
    PAUSED = auto()
    DESTINATION_TOLD = auto()
    PEERS_TOLD = auto()
    ALL_TOLD = auto()
    RELEASED = auto()


@dataclass(frozen=True)
class Move:
    """Who moves where; the guest's frames shall reach `takes`."""

    fabric: Fabric
    mover: Guest
    takes: tuple[str, int]
    sends_by: tuple[str, int]


def tap_of(index: int) -> int:
    return 10 + index


def tap_of_guest(fabric: Fabric, guest: Guest) -> Tap:
    return Tap(tap_of(fabric.guests.index(guest)))


@st.composite
def fabrics(draw: st.DrawFn) -> Fabric:
    """Guests of two tenants on three hosts; both tenants use the same addresses."""
    guests = []
    for index in range(draw(st.integers(2, 7))):
        tunnel = draw(st.sampled_from(TENANTS))
        mac = f"52:54:00:30:00:{index:02x}"
        guests.append(Guest(Key(tunnel, mac), f"10.30.0.{index}", draw(st.sampled_from(HOSTS)), f"guest{index}"))
    situations = {(guest.host, guest.uuid): Situation(Tap(tap_of(index))) for index, guest in enumerate(guests)}
    return Fabric(HOSTS, guests, situations)


@st.composite
def moves(draw: st.DrawFn) -> Move:
    """A fabric at some moment of the move of one of its guests, to another host or to the other slot."""
    fabric = draw(fabrics())
    mover = draw(st.sampled_from(fabric.guests))
    if draw(st.integers(0, 3)) == 0:
        return local_move(fabric, mover, tap_of_guest(fabric, mover), draw(st.sampled_from(Moment)))
    where = remote_move(draw, fabric, mover, NEW_TAP)
    return Move(fabric, mover, where, where)


def remote_move(draw: st.DrawFn, fabric: Fabric, mover: Guest, new_tap: int) -> tuple[str, int]:
    """Puts a guest at some moment of its move to another host; returns by what it sends, and gets its frames."""
    tap, source, moment = tap_of_guest(fabric, mover), mover.host, draw(st.sampled_from(Moment))
    destination = draw(st.sampled_from([host for host in HOSTS if host != source]))
    others = [host for host in HOSTS if host not in (source, destination)]
    if moment is Moment.AT_REST:
        return source, tap.ofport
    if moment is not Moment.RELEASED:
        leaves_for = None if moment is Moment.STAGED else destination
        fabric.situations[source, mover.uuid] = Situation(tap, leaves_for=leaves_for)
        fabric.arriving[mover.uuid] = destination
    else:
        del fabric.situations[source, mover.uuid]
    fabric.situations[destination, mover.uuid] = Situation(new_tap=Tap(new_tap))
    heard = {
        Moment.DESTINATION_TOLD: [destination],
        Moment.PEERS_TOLD: [destination, *others],
        Moment.ALL_TOLD: HOSTS,
        Moment.RELEASED: HOSTS,
    }.get(moment, ())
    fabric.recorded.update({(host, mover.uuid): destination for host in heard})
    if destination in heard:
        fabric.situations[destination, mover.uuid] = Situation(Tap(new_tap))
    return (source, tap.ofport) if moment is Moment.STAGED else (destination, new_tap)


@dataclass(frozen=True)
class TwoMoves:
    """Two guests move at once, each at a moment of its own."""

    fabric: Fabric
    places: Mapping[str, tuple[str, int]]
    """By what each guest, by UUID, sends, and gets its frames."""


@st.composite
def two_moves(draw: st.DrawFn) -> TwoMoves:
    """Of one tenant or of two, the same way or not."""
    fabric = draw(fabrics())
    movers = draw(st.lists(st.sampled_from(fabric.guests), min_size=2, max_size=2, unique=True))
    places = {guest.uuid: (guest.host, tap_of_guest(fabric, guest).ofport) for guest in fabric.guests}
    places |= {mover.uuid: remote_move(draw, fabric, mover, NEW_TAP + n) for n, mover in enumerate(movers)}
    return TwoMoves(fabric, places)


def local_move(fabric: Fabric, mover: Guest, tap: Tap, moment: Moment) -> Move:
    where, old, new = (mover.host, mover.uuid), (mover.host, tap.ofport), (mover.host, NEW_TAP)
    if moment is Moment.AT_REST:
        return Move(fabric, mover, old, old)
    if moment is Moment.STAGED:
        fabric.situations[where] = Situation(tap, Tap(NEW_TAP))
        return Move(fabric, mover, old, old)
    if moment in (Moment.PAUSED, Moment.DESTINATION_TOLD):
        fabric.situations[where] = Situation(tap, Tap(NEW_TAP), leaves_for=HERE)
    else:
        fabric.situations[where] = Situation(Tap(NEW_TAP), leaves_for=HERE if moment is Moment.PEERS_TOLD else None)
    return Move(fabric, mover, new, new)


def place(move: Move, guest: Guest) -> tuple[str, int]:
    """Where a guest's frames shall arrive."""
    return move.takes if guest == move.mover else (guest.host, tap_of(move.fabric.guests.index(guest)))


def sender(move: Move, guest: Guest) -> tuple[str, int]:
    """By what a guest sends."""
    return move.sends_by if guest == move.mover else (guest.host, tap_of(move.fabric.guests.index(guest)))


@given(moves(), st.data())
@settings(max_examples=200)
def test_a_unicast_frame_reaches_its_guest_once_and_nobody_else(move: Move, data: st.DataObject) -> None:
    guests = move.fabric.guests
    one, other = data.draw(st.lists(st.sampled_from(guests), min_size=2, max_size=2, unique=True))
    sent = frame(one.key.mac, other.key.mac, one.address)
    reached = move.fabric.deliver(*sender(move, one), sent)
    expected = [] if one.key.tunnel != other.key.tunnel else [place(move, other)]
    assert [(host, port) for host, port, _ in reached] == expected


@given(moves(), st.data())
@settings(max_examples=200)
def test_a_broadcast_reaches_each_port_of_the_tenant_once_as_it_was_sent(move: Move, data: st.DataObject) -> None:
    guests = move.fabric.guests
    one = data.draw(st.sampled_from(guests))
    sent = frame(one.key.mac, BROADCAST, one.address)
    reached = move.fabric.deliver(*sender(move, one), sent)
    expected = Counter(place(move, guest) for guest in guests if guest.key.tunnel == one.key.tunnel and guest != one)
    assert Counter((host, port) for host, port, _ in reached) == expected
    assert all({**seen, **sent} == seen for _, _, seen in reached)


@given(two_moves(), st.data())
@settings(max_examples=200)
def test_guests_that_move_at_once_are_not_in_each_others_way(moved: TwoMoves, data: st.DataObject) -> None:
    guests, places = moved.fabric.guests, moved.places
    one, other = data.draw(st.lists(st.sampled_from(guests), min_size=2, max_size=2, unique=True))
    reached = moved.fabric.deliver(*places[one.uuid], frame(one.key.mac, other.key.mac, one.address))
    expected = [places[other.uuid]] if one.key.tunnel == other.key.tunnel else []
    assert [(host, port) for host, port, _ in reached] == expected
    sent = frame(one.key.mac, BROADCAST, one.address)
    reached = moved.fabric.deliver(*places[one.uuid], sent)
    tenants = [guest for guest in guests if guest.key.tunnel == one.key.tunnel and guest != one]
    assert Counter((host, port) for host, port, _ in reached) == Counter(places[guest.uuid] for guest in tenants)
    assert all({**seen, **sent} == seen for _, _, seen in reached)


@given(moves(), st.data())
@settings(max_examples=150)
def test_a_frame_with_another_source_goes_nowhere(move: Move, data: st.DataObject) -> None:
    guests = move.fabric.guests
    one, other = data.draw(st.sampled_from(guests)), data.draw(st.sampled_from(guests))
    forged = data.draw(
        st.sampled_from(
            [
                frame("52:54:00:99:00:01", other.key.mac, one.address),
                frame("52:54:00:99:00:01", BROADCAST, one.address),
                frame(one.key.mac, other.key.mac, "10.99.0.1"),
                frame(one.key.mac, BROADCAST, one.address, tagged=0x1000 | 7),
                arp_request(one.key.mac, "10.99.0.1", other.address),
                {**arp_request(one.key.mac, one.address, other.address), Field.ARP_SHA: 5},
                {**frame(one.key.mac, other.key.mac, one.address), Field.ETH_TYPE: 0x86DD},
            ]
        )
    )
    assert move.fabric.deliver(*sender(move, one), forged) == []


@given(moves(), st.data())
def test_arp_is_answered_by_the_bridge_of_who_asks(move: Move, data: st.DataObject) -> None:
    guests = move.fabric.guests
    one, other = data.draw(st.sampled_from(guests)), data.draw(st.sampled_from(guests))
    reached = move.fabric.deliver(*sender(move, one), arp_request(one.key.mac, one.address, other.address))
    if one == other or one.key.tunnel != other.key.tunnel:
        assert all(seen[Field.ARP_OP] == 1 for _, _, seen in reached)
        return
    [(host, port, answer)] = reached
    assert (host, port) == sender(move, one)
    assert (answer[Field.ARP_OP], answer[Field.ARP_SPA]) == (2, ip_number(other.address))
    assert answer[Field.ARP_SHA] == answer[Field.ETH_SRC] == mac_number(other.key.mac)
    assert answer[Field.ARP_THA] == answer[Field.ETH_DST] == mac_number(one.key.mac)
    assert answer[Field.ARP_TPA] == ip_number(one.address)


@given(moves())
def test_what_is_the_sites_own_stays_with_the_site(move: Move) -> None:
    for host in HOSTS:
        flows = move.fabric.flows(host)
        assert [sent.port for sent in process(flows, frame("02:00:00:00:00:01", BROADCAST), 7777)] == [NORMAL]
        # Nothing that comes out of our tunnel port is the site's, whatever its tenant.
        assert process(flows, {**frame("02:00:00:00:00:01", BROADCAST), Field.TUNNEL_ID: 4242}, TUNNEL_PORT) == []


def test_a_paused_guest_gets_nothing() -> None:
    mover = Guest(Key(1001, "52:54:00:30:00:01"), "10.30.0.1", HOSTS[0], "mover")
    fabric = Fabric(HOSTS, [mover], {(HOSTS[0], "mover"): Situation(Tap(10), leaves_for=HOSTS[1])})
    fabric.situations[HOSTS[1], "mover"] = Situation(new_tap=Tap(NEW_TAP))
    for target in (mover.key.mac, BROADCAST):
        packet = {**frame("02:00:00:00:00:01", target), Field.TUNNEL_ID: 1001}
        reached = fabric.deliver(HOSTS[0], TUNNEL_PORT, packet)
        assert [(host, port) for host, port, _ in reached] == [(HOSTS[1], NEW_TAP)]


def test_two_ports_of_a_guest_with_the_same_mark_get_each_group_frame_once() -> None:
    macs = ("52:54:00:30:00:0a", "52:54:00:30:16:5e")
    assert len({mark(mac) for mac in macs}) == 1
    source, destination = Tunnel("10.21.0.1"), Tunnel("10.21.0.2")
    leaving = [Port(mac, 1001, senders=(n,), groups=destination) for n, mac in enumerate(macs, 10)]
    coming = [Port(mac, 1001, place=source, marked=Tap(n)) for n, mac in enumerate(macs, 10)]
    sent = [flow for flow in tenant_flows(leaving, 99) if flow.table == FROM_PORTS and PushVlan() in flow.actions]
    assert [flow.actions.count(Output(99)) for flow in sent] == [1]
    [taken] = [flow for flow in tenant_flows(coming, 99) if PopVlan() in flow.actions]
    assert taken.actions == (PopVlan(), Output(10), Output(11))


def test_a_tenant_without_a_port_here_has_no_flows() -> None:
    elsewhere = treat(Attachment(Key(1001, "52:54:00:30:00:01"), location=HOSTS[1]), Situation())
    assert tenant_flows([elsewhere], TUNNEL_PORT) == frozenset()
    assert all(flow.table for flow in common_flows(None))


def test_a_router_may_send_from_any_address_but_not_from_another_mac() -> None:
    key = Key(1001, "52:54:00:30:00:01")
    router = treat(Attachment(key, ("10.30.0.1",), any_source=True), Situation(Tap(10)))
    guest = treat(Attachment(Key(1001, "52:54:00:30:00:02"), ("10.30.0.2",)), Situation(Tap(11)))
    flows = tenant_flows([router, guest], TUNNEL_PORT) | common_flows(TUNNEL_PORT)
    assert [sent.port for sent in process(flows, frame(key.mac, guest.mac, "192.0.2.1"), 10)] == [11]
    assert process(flows, frame("52:54:00:30:00:09", guest.mac, "192.0.2.1"), 10) == []
