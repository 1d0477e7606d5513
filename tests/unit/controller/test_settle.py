"""What an agent still holds of migrations that are over, on a real etcd."""

import asyncio
from typing import cast

import pytest
from instant_agents import InstantAgent
from leading import Lead
from records import EPOCH, UUID, guest, migration

from handoff.agent.v1.qemu_pb2 import Handoff, HandoffRole, HandoffState
from handoff.agent.v1.types_pb2 import Fence
from handoff.controller.v1.migrations_pb2 import Recovery
from handoff_controller.agents import GrpcAgent
from handoff_controller.etcd.client import EtcdClient
from handoff_controller.etcd.txn import put
from handoff_controller.machine import State, enter
from handoff_controller.settle import Settler
from handoff_controller.store import GUESTS, MIGRATIONS, Reader, encode

HELD = Handoff(
    migration_id="m1",
    role=HandoffRole.HANDOFF_ROLE_SOURCE,
    state=HandoffState.HANDOFF_STATE_HELD,
    domain_uuid=UUID,
    domain_name="web",
)
RAN = Handoff(migration_id="m1", role=HandoffRole.HANDOFF_ROLE_DESTINATION, state=HandoffState.HANDOFF_STATE_ACTIVE)


def settler(client: EtcdClient) -> Settler:
    return Settler(Reader(client), Fence(term=1), lambda _: False)


async def test_a_handoff_without_a_record_is_told_and_left_alone(client: EtcdClient, empty: None) -> None:
    agent = InstantAgent("h1")
    agent.handoffs = [HELD]
    settles = settler(client)

    first = await settles.settle(cast(GrpcAgent, agent))
    again = await settles.settle(cast(GrpcAgent, agent))

    assert first == again
    assert "web" in first[0]
    assert "source (HELD) of migration m1, of which there is no record" in first[0]
    assert agent.calls == []
    assert settles.unsettled == {"h1": {"m1"}}


@pytest.mark.parametrize("given_up_last", ["h2", "h1"])
async def test_a_fenced_hosts_copy_is_evicted_when_it_is_back(
    client: EtcdClient, empty: None, lead: Lead, given_up_last: str
) -> None:
    record = migration("m1")
    for state in (State.COMMITTED, State.FINISHING, State.ABORTING, State.ABORTED):
        record = enter(record, state, at=EPOCH, term=1)
    record.recovery.CopyFrom(Recovery(fenced_host=given_up_last))
    await client.txn([], [put(MIGRATIONS + "m1", encode(record)), put(GUESTS + UUID, encode(guest()))])
    agents = InstantAgent("h2"), InstantAgent("h1")
    agents[0].handoffs, agents[1].handoffs = [RAN], [HELD]

    await asyncio.gather(*(settler(client).settle(cast(GrpcAgent, agent)) for agent in agents))

    assert [agent.calls for agent in agents] == [[("fence", "m1")], [("abort", "m1")]]
