"""etcd in memory, with the semantics that the store relies on: revisions, compares, one order of transactions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from handoff_common.errors import StaleTermError
from handoff_controller.etcd.election import LEADER_PREFIX
from handoff_controller.etcd.txn import (
    Compare,
    DeleteOp,
    KeyValue,
    Op,
    PutOp,
    ReadOp,
    Target,
    TxnResult,
    created_at,
    put,
)


@dataclass
class Cluster:
    """What is stored. Every method is atomic."""

    compares_revisions: bool = True
    """False: a seeded bug, writes don't compare the version of what they change."""
    compares_leader: bool = True
    """False: a seeded bug, writes don't compare the leader's key."""
    revision: int = 1
    keys: dict[str, KeyValue] = field(default_factory=dict)
    _leader_key: str = ""

    def apply(
        self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[ReadOp], *, uncertain: bool = False
    ) -> TxnResult:
        holds = all(self._holds(compare) for compare in compares)
        ops = success if holds else failure
        if any(not isinstance(op, ReadOp) for op in ops):
            self.revision += 1
        reads: list[KeyValue | None] = []
        for op in ops:
            match op:
                case PutOp():
                    before = self.keys.get(op.key)
                    created = before.create_revision if before else self.revision
                    version = before.version + 1 if before else 1
                    self.keys[op.key] = KeyValue(op.key, op.value, created, self.revision, version, op.lease)
                case DeleteOp():
                    self.keys.pop(op.key, None)
                case ReadOp():
                    reads.append(self.keys.get(op.key))
        return TxnResult(holds, self.revision, tuple(reads), uncertain)

    def elect(self) -> "FakeLeadership":
        """The leader's key goes with its lease, and another candidate's key is now the oldest."""
        self.keys.pop(self._leader_key, None)
        self._leader_key = f"{LEADER_PREFIX}{self.revision + 1:x}"
        self.apply([], [put(self._leader_key, b"{}")], [])
        return FakeLeadership(self._leader_key, self.revision)

    def _holds(self, compare: Compare) -> bool:
        found = self.keys.get(compare.key)
        if compare.target is Target.CREATE:
            if compare.key.startswith(LEADER_PREFIX) and not self.compares_leader:
                return True
            return (found.create_revision if found else 0) == compare.revision
        return not self.compares_revisions or (found.mod_revision if found else 0) == compare.revision


@dataclass
class FakeLeadership:
    """As election.Leadership; `over` only once its holder notices, which may be long after it is true."""

    key: str
    term: int
    over: bool = False
    lease_id: int = 1

    def valid(self) -> bool:
        return not self.over

    def check(self) -> None:
        if self.over:
            raise StaleTermError(f"term {self.term} has ended")

    def guard(self) -> Compare:
        self.check()
        return created_at(self.key, self.term)


class Wire(Protocol):
    """The way to etcd and back, with what happens on it."""

    async def read(self, effect: Callable[[], object]) -> None:
        """A read."""

    async def write(self, keys: Sequence[str], effect: Callable[[bool], TxnResult]) -> TxnResult:
        """A transaction; `effect` is told whether an earlier try of it may have been applied."""


class FakeEtcd:
    """As etcd.client.EtcdClient."""

    def __init__(self, cluster: Cluster, wire: Wire) -> None:
        self._cluster = cluster
        self._wire = wire

    async def get(self, key: str, *, deadline_s: float = 10) -> KeyValue | None:
        found: list[KeyValue | None] = []
        await self._wire.read(lambda: found.append(self._cluster.keys.get(key)))
        return found[0]

    async def list(self, prefix: str, *, deadline_s: float = 10) -> tuple[int, tuple[KeyValue, ...]]:
        found: list[tuple[int, tuple[KeyValue, ...]]] = []

        def read_all() -> None:
            keys = sorted(key for key in self._cluster.keys if key.startswith(prefix))
            found.append((self._cluster.revision, tuple(self._cluster.keys[key] for key in keys)))

        await self._wire.read(read_all)
        return found[0]

    async def txn(
        self,
        compares: Sequence[Compare],
        success_ops: Sequence[Op],
        failure_ops: Sequence[ReadOp] = (),
        *,
        deadline_s: float = 10,
    ) -> TxnResult:
        keys = [op.key for op in success_ops if not isinstance(op, ReadOp)]
        return await self._wire.write(
            keys, lambda uncertain: self._cluster.apply(compares, success_ops, failure_ops, uncertain=uncertain)
        )
