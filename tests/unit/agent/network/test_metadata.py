"""Ports in guests' definitions, and what the agent's service makes of them."""

import pytest
from lxml import etree

from handoff_agent.network.metadata import NAMESPACE, NO_TUNNEL, make_attachment, read_claims, read_ports
from handoff_agent.network.treatment import HERE, Key


def a_domain(ports: str) -> etree._Element:
    return etree.fromstring(
        f"<domain><name>web</name><uuid>ABC</uuid><metadata><h:network xmlns:h='{NAMESPACE}'>{ports}</h:network>"
        "<other xmlns='urn:x'/></metadata></domain>"
    )


def test_ports_are_read() -> None:
    [one, two] = read_ports(
        a_domain(
            "<h:port mac='52:54:00:AA:00:01' tunnel='7' ip=' 10.0.0.1  10.0.0.2 '/>"
            "<h:port mac='02:00:00:00:00:01' tunnel='8'/>"
        )
    )
    assert (one.key, one.addresses, one.location) == (Key(7, "52:54:00:aa:00:01"), ("10.0.0.1", "10.0.0.2"), HERE)
    assert (one.domain_uuid, one.name) == ("abc", "web")
    assert (two.key.tunnel, two.addresses) == (8, ())


@pytest.mark.parametrize(
    ("mac", "tunnel", "addresses", "wrong"),
    [
        ("", "7", "", "mac ''"),
        ("52:54:00:aa:00", "7", "", "write it like 52:54"),
        ("52:54:00:aa:00:01", "0", "", "from 1 to 16777215"),
        ("52:54:00:aa:00:01", "16777216", "", "from 1 to 16777215"),
        ("52:54:00:aa:00:01", "x", "", "tunnel 'x'"),
        ("52:54:00:aa:00:01", "7", "10.0.0.300", "no IPv4 address"),
        ("52:54:00:aa:00:01", "7", "fe80::1", "no IPv4 address"),
    ],
)
def test_what_is_wrong_is_said_and_left_out(mac: str, tunnel: str, addresses: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        make_attachment(mac, tunnel, addresses, "abc", "web")
    assert read_ports(a_domain(f"<h:port mac='{mac}' tunnel='{tunnel}' ip='{addresses}'/>")) == ()


def test_what_is_wrong_is_a_tenants_all_the_same() -> None:
    wrong = a_domain("<h:port mac='52:54:00:AA:00:01' tunnel='7' ip='fd00::1'/><h:port mac='x' tunnel='7'/>")
    assert [port.key for port in read_claims(wrong)] == [Key(NO_TUNNEL, "52:54:00:aa:00:01")]


def test_most_guests_have_none() -> None:
    assert read_ports(etree.fromstring("<domain><name>web</name></domain>")) == ()
