"""The plan for a guest's disks in the record of its handoff."""

from collections.abc import Iterable

from google.protobuf.json_format import MessageToJson, Parse

from handoff.agent.v1 import disk_pb2 as pb
from handoff_agent.ledger import Record


def moves_of(record: Record) -> tuple[pb.DiskMove, ...]:
    """The plan, in the order of the XML."""
    return tuple(Parse(text, pb.DiskMove(), ignore_unknown_fields=True) for text in record.disks)


def recorded(moves: Iterable[pb.DiskMove]) -> tuple[str, ...]:
    """The plan as a record keeps it."""
    return tuple(MessageToJson(move, indent=None) for move in moves)
