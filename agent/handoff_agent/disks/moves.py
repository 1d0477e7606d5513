"""The plan for a guest's disks in the record of its handoff."""

from collections.abc import Iterable

from google.protobuf.json_format import MessageToJson, Parse

from handoff.agent.v1 import disk_pb2 as pb
from handoff_agent.disks.plan import MOVED, PULL
from handoff_agent.disks.space import Promise, space_needed_bytes
from handoff_agent.ledger import Record
from handoff_agent.rules import DESTINATION, FINAL_STATES, PREPARED


def moves_of(record: Record) -> tuple[pb.DiskMove, ...]:
    """The plan, in the order of the XML."""
    return tuple(Parse(text, pb.DiskMove(), ignore_unknown_fields=True) for text in record.disks)


def recorded(moves: Iterable[pb.DiskMove]) -> tuple[str, ...]:
    """The plan as a record keeps it."""
    return tuple(MessageToJson(move, indent=None) for move in moves)


def promises(records: Iterable[Record]) -> tuple[Promise, ...]:
    """The space of all disks that are on their way to this host: mirrored until their guest runs, or pulled then."""
    return tuple(
        Promise(record.domain_name, move.path, space_needed_bytes(move))
        for record in records
        if record.role == DESTINATION and record.state not in FINAL_STATES
        for move in moves_of(record)
        if move.strategy in MOVED and (record.state == PREPARED or (record.pulling and move.strategy == PULL))
    )


def restore_facts(disks: Iterable[pb.DiskFacts], moves: Iterable[pb.DiskMove]) -> None:
    """Makes the facts of disks that are pulled those of before they got an overlay, with where their base is."""
    pulled = {move.target: move for move in moves if move.base_uri}
    for disk in disks:
        move = pulled.get(disk.target)
        if move is None:
            continue
        if disk.source == move.overlay:
            disk.source, disk.format = move.source, move.source_format
            del disk.backing[:1]
        disk.base_uri, disk.overlay = move.base_uri, move.overlay
