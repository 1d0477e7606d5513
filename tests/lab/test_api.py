"""The servers as grpcurl sees them: listed by reflection, called, healthy, observable."""

import asyncio
import json
import subprocess

import pytest
from moves import Subject

from handoff_lab.fleet import Fleet
from handoff_lab.host import program

pytestmark = pytest.mark.lab

AGENT = ("10.10.0.1:7701", ("HostService", "QemuService", "DiskService", "FlowService"))
CONTROLLER = ("10.10.0.101:7700", ("MigrationsService", "GuestsService", "HostsService"))


async def buf(fleet: Fleet, url: str, *arguments: str) -> str:
    command = [
        str(program("buf")),
        "curl",
        "--http2-prior-knowledge",
        "--protocol",
        "grpc",
        *arguments,
        f"http://{url}",
    ]
    done: subprocess.CompletedProcess[str] = await asyncio.to_thread(fleet.node("ctl1").run, command)
    return done.stdout


@pytest.mark.parametrize(("address", "services"), [AGENT, CONTROLLER], ids=["agent", "controller"])
async def test_list_and_health(fleet: Fleet, address: str, services: tuple[str, ...]) -> None:
    methods = (await buf(fleet, address, "--list-methods")).split()
    for service in (*services, "grpc.health.v1.Health/Check", "grpc.channelz.v1.Channelz/GetServers"):
        assert any(service in method for method in methods), service
    health = json.loads(await buf(fleet, f"{address}/grpc.health.v1.Health/Check"))
    assert health["status"] == "SERVING"
    assert json.loads(await buf(fleet, f"{address}/grpc.channelz.v1.Channelz/GetServers"))["server"]


async def test_calls(subject: Subject, fleet: Fleet) -> None:
    host = json.loads(await buf(fleet, f"{AGENT[0]}/handoff.agent.v1.HostService/GetHost"))["host"]
    assert host["name"] == "h1"
    here = await subject.host()
    domains = json.loads(await buf(fleet, f"10.10.0.{here[1:]}:7701/handoff.agent.v1.QemuService/ListDomains"))[
        "domains"
    ]
    assert subject.record.uuid in [domain["uuid"] for domain in domains]
    question = json.dumps({"guest": subject.name})
    guest = json.loads(
        await buf(fleet, f"{CONTROLLER[0]}/handoff.controller.v1.GuestsService/GetGuest", "-d", question)
    )["guest"]
    assert guest["owner"]["host"] == here
