"""A replica as a process of its own: it leads when elected, writes every 20 ms and tells each step as a JSON line.

    candidate.py ENDPOINTS NAME PREFIX

It writes PREFIXrecord. A second, careless writer takes its guard once and goes on with PREFIXcareless whatever
happens to the leadership, until etcd refuses it.
"""

import asyncio
import json
import signal
import sys
import time

from handoff_common.errors import HandoffError, StaleTermError
from handoff_common.logs import configure_logs
from handoff_controller.etcd.client import EtcdClient
from handoff_controller.etcd.election import Election, Leadership
from handoff_controller.etcd.txn import Compare, put


def tell(event: str, term: int = 0) -> None:
    print(json.dumps({"event": event, "term": term, "at": time.monotonic()}), flush=True)


async def main(endpoints: str, name: str, prefix: str) -> None:
    careless: list[asyncio.Task[None]] = []
    async with EtcdClient(endpoints.split(",")) as client:

        async def write_carelessly(guard: Compare, term: int) -> None:
            while True:
                try:
                    result = await client.txn([guard], [put(f"{prefix}careless", f"{name} {term}".encode())])
                except HandoffError:
                    continue
                if not result.succeeded:
                    tell("careless write refused", term)
                    return
                await asyncio.sleep(0.02)

        async def lead(leadership: Leadership) -> None:
            tell("leading", leadership.term)
            careless.append(asyncio.create_task(write_carelessly(leadership.guard(), leadership.term)))
            try:
                while True:
                    value = f"{name} {leadership.term}".encode()
                    try:
                        result = await client.txn([leadership.guard()], [put(f"{prefix}record", value)])
                    except StaleTermError:
                        raise
                    except HandoffError:
                        continue
                    tell("written" if result.succeeded else "refused", leadership.term)
                    await asyncio.sleep(0.02)
            finally:
                tell("stopped", leadership.term)

        election = Election(client, name, f"{name}:7700", prefix=f"{prefix}leader/")
        running = asyncio.create_task(election.run(lead))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
        await asyncio.wait([running])
        for task in careless:
            task.cancel()
        await asyncio.gather(*careless, return_exceptions=True)


configure_logs("console")
asyncio.run(main(*sys.argv[1:]))
