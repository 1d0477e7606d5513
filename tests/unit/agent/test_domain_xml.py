"""Rewriting a guest's XML: what must differ differs, and nothing else."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from handoff_agent.domain_xml import QEMU_NAMESPACE, XmlChanges, destination_xml, persistent_xml
from handoff_common.errors import InvalidArgumentError

DATA = Path(__file__).parent / "data"
RICH = (DATA / "rich.xml").read_text()
CHANGES = XmlChanges(
    emulator="/opt/qemu-7.2/bin/qemu-system-x86_64",
    source_emulator="/usr/bin/qemu-system-x86_64",
    graphics_address="10.1.0.12",
)
SAME = XmlChanges(emulator="/usr/bin/qemu-system-x86_64", source_emulator="/usr/bin/qemu-system-x86_64")
ARGS = f"{{{QEMU_NAMESPACE}}}commandline/{{{QEMU_NAMESPACE}}}arg"


def arguments(xml: str) -> list[str]:
    return [arg.get("value", "") for arg in etree.fromstring(xml.encode()).iterfind(ARGS)]


def without_changes(xml: str) -> bytes:
    """Everything but the emulator and the command line, in canonical form."""
    root = etree.fromstring(xml.encode())
    for element in (root.find("devices/emulator"), root.find(f"{{{QEMU_NAMESPACE}}}commandline")):
        if element is not None:
            parent = element.getparent()
            assert parent is not None
            parent.remove(element)
    etree.cleanup_namespaces(root, keep_ns_prefixes=["qemu"])
    for element in root.iter():
        element.tail = (element.tail or "").strip()
    return etree.tostring(root, method="c14n")


def test_golden() -> None:
    assert destination_xml(RICH, CHANGES) + "\n" == (DATA / "rich.destination.xml").read_text()


def test_golden_persistent() -> None:
    incoming = destination_xml(RICH, CHANGES)
    back = XmlChanges(SAME.emulator, CHANGES.emulator, "10.1.0.11")
    assert persistent_xml(incoming, back) == destination_xml(RICH, SAME).replace(
        '    <qemu:arg value="-incoming"/>\n    <qemu:arg value="defer"/>\n', ""
    )


@pytest.mark.parametrize("name", ["rich.xml", "rich.destination.xml"])
def test_golden_files_are_what_libvirt_accepts(name: str) -> None:
    schema = etree.RelaxNG(etree.parse("/usr/share/libvirt/schemas/domain.rng"))
    schema.assertValid(etree.parse(str(DATA / name)))


def test_devices_keep_their_addresses() -> None:
    def addresses(xml: str) -> list[dict[str, str]]:
        return [dict(found.attrib) for found in etree.fromstring(xml.encode()).iter("address")]

    assert addresses(destination_xml(RICH, CHANGES)) == addresses(RICH)


def test_command_line_keeps_its_own_arguments() -> None:
    moved = destination_xml(RICH, CHANGES)
    assert arguments(moved) == ["-name", "billing-db-1,debug-threads=on", "-incoming", "defer"]
    assert 'name="QEMU_AUDIO_DRV"' in moved


@pytest.mark.parametrize(
    "earlier",
    [
        ["-incoming", "defer"],
        ["--incoming", "tcp:0:49152"],
        ["-incoming", "defer", "-incoming", '{"channel-type":"cpr"}'],
        ["-S", "-incoming", "defer", "-foo", "bar"],
        ["-foo", "bar", "-incoming"],
    ],
)
def test_earlier_incoming_is_replaced_wherever_it_stood(earlier: list[str]) -> None:
    args = "".join(f"<q:arg value='{value}'/>" for value in earlier)
    xml = f"<domain xmlns:q='{QEMU_NAMESPACE}'><devices/><q:commandline>{args}</q:commandline></domain>"
    others = [value for value in earlier if value in ("-S", "-foo", "bar")]
    assert arguments(destination_xml(xml, CHANGES)) == [*others, "-incoming", "defer"]
    assert arguments(persistent_xml(xml, CHANGES)) == others


def test_a_value_that_reads_like_the_option_is_no_option() -> None:
    args = "".join(f"<q:arg value='{value}'/>" for value in ("-incoming", "-incoming", "-name", "x"))
    xml = f"<domain xmlns:q='{QEMU_NAMESPACE}'><q:commandline>{args}</q:commandline></domain>"
    assert arguments(persistent_xml(xml, CHANGES)) == ["-name", "x"]


def test_comments_between_arguments_stay() -> None:
    xml = (
        f"<domain xmlns:q='{QEMU_NAMESPACE}'><q:commandline><q:arg value='-incoming'/><!-- why -->"
        "<q:arg value='defer'/></q:commandline></domain>"
    )
    assert "<!-- why -->" in persistent_xml(xml, CHANGES)
    assert arguments(persistent_xml(xml, CHANGES)) == []


def test_many_moves_leave_one_incoming() -> None:
    once = xml = destination_xml(RICH, SAME)
    for _ in range(50):
        xml = destination_xml(xml, SAME)
    assert xml == once
    assert "-incoming" not in persistent_xml(xml, SAME)


def test_a_definition_for_another_emulator_keeps_it() -> None:
    xml = RICH.replace("/usr/bin/qemu-system-x86_64", "/opt/next/bin/qemu-system-x86_64")
    assert "<emulator>/opt/next/bin/qemu-system-x86_64</emulator>" in persistent_xml(xml, CHANGES)
    assert f"<emulator>{CHANGES.emulator}</emulator>" in persistent_xml(RICH, CHANGES)


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("10.1.0.11", "10.1.0.12"),
        ("fd00::11", "10.1.0.12"),
        ("0.0.0.0", "0.0.0.0"),
        ("::", "::"),
        ("127.0.0.1", "127.0.0.1"),
        ("consoles.example.org", "consoles.example.org"),
    ],
)
def test_a_display_on_one_address_moves_to_the_destination(listen: str, expected: str) -> None:
    xml = (
        f"<domain><devices><graphics type='vnc' listen='{listen}'><listen type='address' address='{listen}'/>"
        "<listen type='network' network='n' address='10.9.9.9'/></graphics></devices></domain>"
    )
    graphics = etree.fromstring(destination_xml(xml, CHANGES).encode()).find("devices/graphics")
    assert graphics is not None
    assert graphics.get("listen") == expected
    assert [child.get("address") for child in graphics] == [expected, "10.9.9.9"]
    assert "10.1.0.12" not in destination_xml(xml, SAME)


@pytest.mark.parametrize("broken", ["", "<domain>", "<network/>", "not xml"])
def test_what_is_no_domain_is_refused(broken: str) -> None:
    with pytest.raises(InvalidArgumentError):
        destination_xml(broken, CHANGES)


def test_entities_are_not_fetched(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("root:x")
    xml = f"<!DOCTYPE domain [<!ENTITY e SYSTEM 'file://{secret}'>]><domain><name>&e;</name></domain>"
    assert "root:x" not in destination_xml(xml, CHANGES)


names = st.from_regex(r"\A[a-z][a-z0-9_.]{0,8}\Z").filter(
    lambda name: name not in ("emulator", "graphics", "commandline", "arg")
)
texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="\ufffe\uffff"))


@st.composite
def foreign_elements(draw: st.DrawFn, depth: int = 2) -> etree._Element:
    namespace = draw(st.sampled_from(["", "{http://example.org/a}", f"{{{QEMU_NAMESPACE}}}"]))
    element = etree.Element(namespace + draw(names), draw(st.dictionaries(names, texts, max_size=3)))
    element.text = draw(texts)
    if draw(st.booleans()):
        element.append(etree.Comment(draw(names)))
    if depth:
        element.extend(draw(st.lists(foreign_elements(depth=depth - 1), max_size=2)))
    return element


@given(st.data())
def test_what_we_do_not_know_is_carried_through(data: st.DataObject) -> None:
    root = etree.fromstring(RICH.encode())
    parents = [element for element in root.iter(etree.Element) if "commandline" not in str(element.tag)]
    for stranger in data.draw(st.lists(foreign_elements(), min_size=1, max_size=4)):
        parent = data.draw(st.sampled_from(parents))
        if parent.tag != "emulator":
            parent.insert(data.draw(st.integers(0, len(parent))), stranger)
    xml = etree.tostring(root, encoding="unicode")
    moved = destination_xml(xml, SAME)
    assert without_changes(moved) == without_changes(xml)
    assert destination_xml(moved, SAME) == moved
    assert without_changes(persistent_xml(moved, SAME)) == without_changes(xml)


@given(st.lists(st.sampled_from(["-incoming", "--incoming", "defer", "-name", "x", "-S"]), max_size=8))
def test_incoming_never_accumulates(args: list[str]) -> None:
    elements = "".join(f"<q:arg value='{value}'/>" for value in args)
    xml = f"<domain xmlns:q='{QEMU_NAMESPACE}'><devices/><q:commandline>{elements}</q:commandline></domain>"
    once = destination_xml(xml, SAME)
    assert arguments(once)[-2:] == ["-incoming", "defer"]
    assert destination_xml(once, SAME) == once
    assert arguments(persistent_xml(once, SAME)) == arguments(once)[:-2]
