"""What a transaction is made of: plain data in, wire messages out.

A transaction is `compares` (all must hold), operations applied together when they do, and reads answered when they
don't. Build the parts with the functions at the end of this module.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from etcdserverpb import rpc_pb2
from mvccpb import kv_pb2


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key as etcd keeps it. Revisions are those of the whole store; `version` counts the writes of this key."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int


class Target(enum.Enum):
    """What a compare looks at."""

    CREATE = "create_revision"
    MOD = "mod_revision"


@dataclass(frozen=True, slots=True)
class Compare:
    """Holds while the key's create or mod revision is exactly `revision`; 0 stands for a key that does not exist."""

    key: str
    target: Target
    revision: int


@dataclass(frozen=True, slots=True)
class PutOp:
    """Writes a key; `lease` 0 means that it stays until deleted."""

    key: str
    value: bytes
    lease: int


@dataclass(frozen=True, slots=True)
class DeleteOp:
    """Deletes a key; nothing happens when there is none."""

    key: str


@dataclass(frozen=True, slots=True)
class ReadOp:
    """Reads a key as of the transaction."""

    key: str


Op = PutOp | DeleteOp | ReadOp


@dataclass(frozen=True, slots=True)
class TxnResult:
    """How a transaction ended.

    `succeeded`: all compares held and the operations were applied, once. `revision`: the store's, right after it.
    `reads`: the answers to the ReadOps of the branch that was taken, in order, None for a key that does not exist.
    `uncertain`: an earlier try got no answer, so when `succeeded` is False, it may be that try which was applied and
    made the compares fail: compare what is there with what was to be written before calling it a conflict.
    """

    succeeded: bool
    revision: int
    reads: tuple[KeyValue | None, ...]
    uncertain: bool


def created_at(key: str, revision: int) -> Compare:
    """Holds while the key is the one that was created at `revision`, however often it was written since."""
    return Compare(key, Target.CREATE, revision)


def modified_at(key: str, revision: int) -> Compare:
    """Holds while nobody has written the key since `revision`."""
    return Compare(key, Target.MOD, revision)


def missing(key: str) -> Compare:
    """Holds while there is no such key."""
    return Compare(key, Target.CREATE, 0)


def put(key: str, value: bytes, lease: int = 0) -> PutOp:
    """Writes `value`; with a lease, the key goes when the lease does."""
    return PutOp(key, value, lease)


def delete(key: str) -> DeleteOp:
    """Deletes the key."""
    return DeleteOp(key)


def read(key: str) -> ReadOp:
    """Reads the key; the answer is in TxnResult.reads."""
    return ReadOp(key)


def applies_once(compares: Sequence[Compare], ops: Sequence[Op]) -> bool:
    """Whether a transaction that was applied refuses itself when it is sent again.

    So it is when an operation breaks one of the compares: a put under `modified_at` or `missing`, a delete under
    `created_at` or `modified_at` of the same key. A transaction that changes nothing may be repeated as well.
    """
    puts = {op.key for op in ops if isinstance(op, PutOp)}
    deletes = {op.key for op in ops if isinstance(op, DeleteOp)}
    if not puts and not deletes:
        return True
    return any(
        (compare.key in puts and (compare.target is Target.MOD or compare.revision == 0))
        or (compare.key in deletes and compare.revision > 0)
        for compare in compares
    )


def to_request(compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[ReadOp]) -> rpc_pb2.TxnRequest:
    """Builds the wire message."""
    return rpc_pb2.TxnRequest(
        compare=[_to_compare(compare) for compare in compares],
        success=[_to_op(op) for op in success],
        failure=[_to_op(op) for op in failure],
    )


def to_result(response: rpc_pb2.TxnResponse, *, uncertain: bool) -> TxnResult:
    """Reads the wire message."""
    ranges = [part.response_range for part in response.responses if part.HasField("response_range")]
    reads = tuple(to_key_value(found.kvs[0]) if found.kvs else None for found in ranges)
    return TxnResult(response.succeeded, response.header.revision, reads, uncertain)


def to_key_value(message: kv_pb2.KeyValue) -> KeyValue:
    """Reads the wire message."""
    return KeyValue(
        key=message.key.decode(),
        value=message.value,
        create_revision=message.create_revision,
        mod_revision=message.mod_revision,
        version=message.version,
        lease=message.lease,
    )


def _to_compare(compare: Compare) -> rpc_pb2.Compare:
    key = compare.key.encode()
    if compare.target is Target.CREATE:
        return rpc_pb2.Compare(target=rpc_pb2.Compare.CREATE, key=key, create_revision=compare.revision)
    return rpc_pb2.Compare(target=rpc_pb2.Compare.MOD, key=key, mod_revision=compare.revision)


def _to_op(op: Op) -> rpc_pb2.RequestOp:
    key = op.key.encode()
    match op:
        case PutOp():
            return rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=key, value=op.value, lease=op.lease))
        case DeleteOp():
            return rpc_pb2.RequestOp(request_delete_range=rpc_pb2.DeleteRangeRequest(key=key))
        case ReadOp():
            return rpc_pb2.RequestOp(request_range=rpc_pb2.RangeRequest(key=key))
