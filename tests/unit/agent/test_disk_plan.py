"""The plan for a guest's disks, as a function of facts alone."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handoff.agent.v1 import disk_pb2 as pb
from handoff.agent.v1 import types_pb2 as types
from handoff_agent.disks.moves import promises, recorded, restore_facts
from handoff_agent.disks.plan import (
    CONVERT,
    COPY,
    DEEPEST_CHAIN,
    MOVED,
    PULL,
    REFUSE,
    SKIP,
    Place,
    Site,
    lacks_only_space,
    paths_here,
    plan,
    refusal,
)
from handoff_agent.disks.rewrite import with_disks
from handoff_agent.disks.space import PathFacts, Promise, promised_bytes, space_needed_bytes
from handoff_agent.ledger import Record
from handoff_agent.rules import (
    ACTIVE,
    DESTINATION,
    FAILED,
    FINAL_STATES,
    PREPARED,
    SOURCE,
    Role,
    State,
    role_name,
    state_name,
)
from handoff_common.errors import ExhaustedError, PreconditionError

MIB = 1 << 20
GIB = 1 << 30


def disk(target: str = "vda", **fields: object) -> pb.DiskFacts:
    facts = pb.DiskFacts(
        target=target,
        device="disk",
        kind="file",
        source=f"/srv/vms/{target}.qcow2",
        format="qcow2",
        placement=types.DISK_PLACEMENT_LOCAL,
        virtual_size_bytes=10 * GIB,
        allocated_bytes=GIB,
    )
    for name, value in fields.items():
        if isinstance(value, tuple):
            getattr(facts, name).extend(value)
        else:
            setattr(facts, name, value)
    return facts


def site(
    *disks: pb.DiskFacts, place: Place | None = None, fast: bool = False, free_bytes: int = 100 * GIB, **facts: object
) -> Site:
    place = place or Place()
    found = PathFacts(free_bytes=free_bytes, **facts)  # type: ignore[arg-type]
    return Site("h2", "ssd", place, dict.fromkeys(paths_here(disks, place, fast=fast), found))


def the_plan(facts: pb.DiskFacts, *, place: Place | None = None, fast: bool = False, **here: object) -> pb.DiskMove:
    (move,) = plan([facts], site(facts, place=place, fast=fast, **here), fast=fast)  # type: ignore[arg-type]
    return move


SSD = Place("/srv/ssd", "raw")


def test_the_same_at_both_hosts_is_a_copy() -> None:
    move = the_plan(disk())
    assert (move.strategy, move.path, move.format) == (COPY, "/srv/vms/vda.qcow2", "qcow2")
    assert move.bytes_to_send == GIB
    assert "h2 gets it at the same path" in move.reason


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (SSD, ("/srv/ssd/vda.raw", "raw")),
        (Place("/srv/ssd"), ("/srv/ssd/vda.qcow2", "qcow2")),
        (Place("", "raw"), ("/srv/vms/vda.raw", "raw")),
    ],
)
def test_another_type_of_host_is_a_conversion(place: Place, expected: tuple[str, str]) -> None:
    move = the_plan(disk(), place=place)
    assert (move.strategy, (move.path, move.format)) == (CONVERT, expected)
    assert "hosts of the type ssd" in move.reason


def test_a_name_that_does_not_tell_the_format_stays() -> None:
    assert the_plan(disk(source="/srv/vms/disk-0.img"), place=SSD).path == "/srv/ssd/disk-0.img"


def test_a_block_device_becomes_a_file_where_there_is_a_folder() -> None:
    device = disk(kind="block", source="/dev/vg/vm.raw", format="raw")
    assert the_plan(device, place=Place("/srv/ssd")).path == "/srv/ssd/vm.raw"
    refused = the_plan(device)
    assert refused.strategy == REFUSE
    assert "names no folder" in refused.reason


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        (types.DISK_PLACEMENT_SHARED, "sees the same file"),
        (types.DISK_PLACEMENT_NETWORK, "opens the same one"),
        (types.DISK_PLACEMENT_EMPTY, "no medium"),
    ],
)
def test_what_both_hosts_see_is_skipped(placement: types.DiskPlacement.ValueType, words: str) -> None:
    move = the_plan(disk(placement=placement, format="rbd", snapshots=3), place=SSD, exists=True)
    assert move.strategy == SKIP
    assert words in move.reason
    assert move.bytes_to_send == 0


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nbd:web", "network volume web (NBD): h2 opens the same one"),
        ("rbd:vms/web", "network volume vms/web (RBD)"),
        ("iscsi:iqn.2026-01.example:web/1", "network volume iqn.2026-01.example:web/1 (iSCSI)"),
        ("gluster:vol/web", "network volume vol/web (gluster)"),
    ],
)
def test_a_network_volume_is_told_by_its_kind(source: str, words: str) -> None:
    move = the_plan(disk(placement=types.DISK_PLACEMENT_NETWORK, kind="network", source=source), fast=True, place=SSD)
    assert (move.strategy, move.path, move.bytes_to_send) == (SKIP, source, 0)
    assert words in move.reason


def the_plan_of_tls(*, fast: bool) -> pb.DiskMove:
    (move,) = plan([disk()], replace(site(disk(), fast=fast), tls=True), fast=fast)
    return move


def test_fast_pulls_and_stays_qcow2() -> None:
    move = the_plan(disk(), fast=True, place=SSD)
    assert (move.strategy, move.path, move.format) == (PULL, "/srv/ssd/vda.qcow2", "qcow2")
    assert "though ssd hosts have raw" in move.reason
    assert the_plan(disk(read_only=True), fast=True).strategy == COPY
    assert the_plan(disk(kind="block", source="/dev/vg/a"), fast=True, place=SSD).strategy == CONVERT
    assert "can't be pulled by TLS" in the_plan_of_tls(fast=True).reason
    assert the_plan_of_tls(fast=False).strategy == COPY


def test_a_backing_file_is_taken_in() -> None:
    assert "takes in what it is backed by (/srv/base)" in the_plan(disk(backing=("/srv/base",))).reason


@pytest.mark.parametrize(("place", "fast"), [(Place(), False), (SSD, False), (Place(), True)])
def test_a_plan_says_that_bitmaps_are_lost(place: Place, fast: bool) -> None:
    move = the_plan(disk(bitmaps=("b1", "b2"), backing=("/srv/base",)), place=place, fast=fast)
    assert move.strategy in MOVED
    assert move.reason.endswith(
        "; it takes in what it is backed by (/srv/base); its dirty bitmaps (b1, b2) are lost: the next backup of it"
        " must be a full one"
    )
    assert "bitmaps" not in the_plan(disk(bitmaps=("b1",), placement=types.DISK_PLACEMENT_SHARED)).reason


REFUSED = {
    "iso": ({"device": "cdrom"}, "virsh change-media vda --eject"),
    "lun": ({"device": "lun", "kind": "block"}, "passed through"),
    "nvme": ({"kind": "nvme"}, "passed through"),
    "format": ({"format": "vmdk"}, "has the format vmdk"),
    "encrypted": ({"encrypted": True}, "is encrypted"),
    "shareable": ({"shareable": True}, "shared with other guests"),
    "snapshots": ({"snapshots": 2}, "has 2 snapshots inside"),
    "data file": ({"data_file": "d.raw"}, "has its data in another file (d.raw)"),
    "chain": ({"backing": tuple("abcdefgh")}, f"chain of 8 images, and {DEEPEST_CHAIN - 1} are handled"),
    "size": ({"virtual_size_bytes": 0}, "does not tell its size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    fields, words = REFUSED[case]
    facts = disk(**fields)
    move = the_plan(facts)
    assert move.strategy == REFUSE
    assert words in move.reason
    error = refusal("web", [move], only_space=lacks_only_space([facts], site(facts)))
    assert isinstance(error, PreconditionError)
    assert "guest web: disk vda" in error.message


def test_places_that_are_taken_or_missing() -> None:
    assert "that file exists; remove it there" in the_plan(disk(), exists=True).reason
    assert "has no such folder" in the_plan(disk(), folder_exists=False).reason
    one, two = disk("vda", source="/a/x.qcow2"), disk("vdb", source="/b/x.qcow2")
    _, second = plan([one, two], site(one, two, place=SSD))
    assert second.strategy == REFUSE
    assert "would both be /srv/ssd/x.raw" in second.reason


def test_disks_share_the_free_space_of_a_file_system() -> None:
    one, two = disk("vda"), disk("vdb")
    enough = 2 * space_needed_bytes(the_plan(one))
    assert [move.strategy for move in plan([one, two], site(one, two, free_bytes=enough))] == [COPY, COPY]
    here = site(one, two, free_bytes=enough - 1)
    moves = plan([one, two], here)
    assert [move.strategy for move in moves] == [REFUSE, REFUSE]
    assert "MiB free" in moves[0].reason
    assert isinstance(refusal("web", moves, only_space=lacks_only_space([one, two], here)), ExhaustedError)


def on_its_way(guest: str, state: State, *, pulling: bool = False, role: Role = DESTINATION) -> Record:
    """One disk that is copied, one that is pulled, and one that is shared; a GiB each."""
    moves = [
        pb.DiskMove(path=f"/srv/vms/{guest}-{name}", strategy=strategy, virtual_size_bytes=GIB, bytes_to_send=GIB)
        for name, strategy in (("copied", COPY), ("pulled", PULL), ("shared", SKIP))
    ]
    return Record(f"m-{guest}", role, state, domain_name=guest, disks=recorded(moves), pulling=pulling)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (on_its_way("web", PREPARED, pulling=True), ["web-copied", "web-pulled"]),
        (on_its_way("web", ACTIVE, pulling=True), ["web-pulled"]),
        (on_its_way("web", FAILED, pulling=True), ["web-pulled"]),
        (on_its_way("web", ACTIVE), []),
        *[(on_its_way("web", state, pulling=True), []) for state in FINAL_STATES],
        (on_its_way("web", PREPARED, pulling=True, role=SOURCE), []),
    ],
    ids=lambda each: f"{role_name(each.role)}-{state_name(each.state)}" if isinstance(each, Record) else "",
)
def test_space_is_promised_to_what_still_comes(record: Record, expected: list[str]) -> None:
    found = promises([record])
    assert [promise.path.removeprefix("/srv/vms/") for promise in found] == expected
    assert all(promise == Promise("web", promise.path, GIB + (64 << 20)) for promise in found)


def test_what_is_promised_to_others_is_not_free() -> None:
    needed = space_needed_bytes(the_plan(disk()))
    web, db, else_where = Promise("web", "/w", 3 * GIB), Promise("db", "/d", 2 * GIB), Promise("x", "/x", 99 * GIB)
    there = {
        "/w": PathFacts(exists=True, allocated_bytes=GIB),
        "/d": PathFacts(exists=True, allocated_bytes=2 * GIB + 1),
        "/x": PathFacts(file_system=7),
    }

    def judged(free_bytes: int) -> pb.DiskMove:
        here = site(disk(), free_bytes=free_bytes)
        paths = {**here.paths, **there}
        (move,) = plan([disk()], replace(here, paths=paths, promises=(web, db, else_where)))
        return move

    assert judged(needed + 2 * GIB).strategy == COPY
    refused = judged(needed + 2 * GIB - 1)
    assert refused.strategy == REFUSE
    assert refused.reason == (
        f"needs {needed >> 20} MiB in /srv/vms on host h2, which has {(needed + 2 * GIB - 1) >> 20} MiB free and has"
        " promised 2048 MiB to disks on their way there (web)"
    )


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.integers(0, 9), st.integers(0, 1)), max_size=6),
    st.integers(0, 1),
)
def test_nobody_is_promised_less_than_nothing(images: list[tuple[str, int, int, int]], file_system: int) -> None:
    made = [Promise(guest, f"/{number}", size) for number, (guest, size, _, _) in enumerate(images)]
    paths = {
        f"/{number}": PathFacts(allocated_bytes=allocated, file_system=where)
        for number, (_, _, allocated, where) in enumerate(images)
    }
    lacking = promised_bytes(made, paths, file_system)
    expected = sum(max(0, size - allocated) for _, size, allocated, where in images if where == file_system)
    assert sum(lacking.values()) == expected
    assert all(value > 0 for value in lacking.values())


FACTS = st.builds(
    disk,
    st.sampled_from(["vda", "vdb", "sda"]),
    device=st.sampled_from(["disk", "cdrom", "lun"]),
    kind=st.sampled_from(["file", "block", "network", "nvme"]),
    format=st.sampled_from(["raw", "qcow2", "vmdk", ""]),
    placement=st.sampled_from([types.DISK_PLACEMENT_LOCAL, types.DISK_PLACEMENT_SHARED, types.DISK_PLACEMENT_NETWORK]),
    read_only=st.booleans(),
    shareable=st.booleans(),
    encrypted=st.booleans(),
    snapshots=st.integers(0, 2),
    virtual_size_bytes=st.integers(0, 1 << 40),
    allocated_bytes=st.integers(0, 1 << 41),
    backing=st.lists(st.just("/b"), max_size=9).map(tuple),
)


@given(
    st.lists(FACTS, max_size=4, unique_by=lambda facts: facts.target),
    st.sampled_from([Place(), SSD, Place("/srv/ssd")]),
    st.booleans(),
    st.integers(0, 1 << 42),
    st.booleans(),
)
def test_every_plan_holds_what_it_says(
    disks: list[pb.DiskFacts], place: Place, fast: bool, free_bytes: int, exists: bool
) -> None:
    here = site(*disks, place=place, fast=fast, free_bytes=free_bytes, exists=exists)
    moves = plan(disks, here, fast=fast)
    assert [move.target for move in moves] == [facts.target for facts in disks]
    moved = [move for move in moves if move.strategy in MOVED]
    for facts, move in zip(disks, moves, strict=True):
        assert move.reason
        assert move.bytes_to_send <= facts.virtual_size_bytes
        if move.strategy == PULL:
            assert fast
            assert move.format == "qcow2"
        if move.strategy == COPY:
            assert (move.path, move.format) == (facts.source, facts.format)
        if move.strategy == SKIP:
            assert facts.placement != types.DISK_PLACEMENT_LOCAL
    assert len({move.path for move in moved}) == len(moved)
    assert sum(space_needed_bytes(move) for move in moved) <= free_bytes or not moved
    assert not (exists and moved)
    assert (refusal("g", moves, only_space=False) is None) == all(move.strategy != REFUSE for move in moves)


XML = """<domain><devices>
  <disk type='block' device='disk'><source dev='/dev/vg/a'/><target dev='vda'/></disk>
  <disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none'/><source file='/o/b.qcow2'/>
    <backingStore type='file'><format type='raw'/><source file='/o/base'/><backingStore/></backingStore>
    <target dev='vdb'/></disk>
  <disk type='file' device='disk'><source file='/keep'/><target dev='vdc'/></disk>
</devices></domain>"""


def test_the_xml_names_what_the_disks_are_at_the_destination() -> None:
    moves = (
        pb.DiskMove(target="vda", strategy=CONVERT, source="/dev/vg/a", path="/n/a", format="raw"),
        pb.DiskMove(
            target="vdb", strategy=PULL, source="/o/b.qcow2", path="/n/b", format="qcow2", base_uri="nbd://[::1]:9/x"
        ),
        pb.DiskMove(target="vdc", strategy=SKIP, source="/keep", path="/keep"),
    )
    running = with_disks(XML, moves, running=True)
    assert '<disk type="file" device="disk"><driver name="qemu" type="raw"/><source file="/n/a"/>' in running
    assert '<driver name="qemu" type="qcow2" cache="none"/><source file="/n/b"/>' in running
    assert '<source protocol="nbd" name="x"><host name="::1" port="9"/><reconnect delay=' in running
    assert "/o/base" not in running
    assert "/keep" in running
    assert with_disks(running, moves, running=True) == running
    kept = with_disks(XML, moves, running=False)
    assert "nbd" not in kept
    assert "/n/b" in kept


def test_a_definition_with_another_disk_for_the_next_boot_keeps_it() -> None:
    move = pb.DiskMove(target="vdb", strategy=COPY, source="/other", path="/n/b", format="raw")
    assert "/o/b.qcow2" in with_disks(XML, (move,), running=False)
    assert with_disks("", (move,), running=False) == ""


def test_facts_of_a_disk_with_an_overlay_are_those_of_before() -> None:
    facts = disk(source="/srv/vms/vda.m1", backing=("/srv/vms/vda.qcow2", "/srv/base"))
    move = pb.DiskMove(
        target="vda", source="/srv/vms/vda.raw", source_format="raw", overlay="/srv/vms/vda.m1", base_uri="nbd://h:1/x"
    )
    restore_facts([facts], [move])
    assert (facts.source, facts.format, list(facts.backing)) == ("/srv/vms/vda.raw", "raw", ["/srv/base"])
    assert facts.base_uri == "nbd://h:1/x"
