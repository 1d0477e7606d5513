"""One OpenFlow connection to a bridge, over its management socket.

Everything that can be checked is checked before a bundle is committed: a commit behind a refused message would still
change flows. So a bundle takes two round trips: open, all messages and a barrier, then the commit.
"""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Self

from handoff_agent.network import openflow
from handoff_agent.network.flow import Flow, Output, SetField
from handoff_agent.network.openflow import Bundle, Failure, PortDescription, SeenFlow, Type
from handoff_common.errors import DeadlineError, HandoffError, PreconditionError, UnavailableError

ANSWER_TIMEOUT_S: Final = 5.0
SILENCE_S: Final = 5.0


class OpenFlowConnection:
    """Open it with `open`, await `run` as its owner; `run` ends when the switch goes away."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        on_port: Callable[[bool, PortDescription], None],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._on_port = on_port
        self._xids = itertools.count(1)
        self._bundles = itertools.count(1)
        self._answers: dict[int, asyncio.Future[bytes]] = {}
        self._failures: dict[int, Failure] = {}
        self._parts: dict[int, list[bytes]] = {}
        self._lost: HandoffError | None = None

    @classmethod
    async def open(cls, path: Path, on_port: Callable[[bool, PortDescription], None]) -> Self:
        """Connects, and greets. `on_port(present, port)` is called whenever a port comes, changes or goes.

        Raises UnavailableError when there is no switch, PreconditionError when it does not speak OpenFlow 1.4.
        """
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(str(path))
                writer.write(openflow.message(Type.HELLO, 0))
                version, kind, length, _ = openflow.HEADER.unpack(await reader.readexactly(openflow.HEADER.size))
                await reader.readexactly(length - openflow.HEADER.size)
        except TimeoutError:
            raise UnavailableError(f"Open vSwitch at {path} does not answer") from None
        except (OSError, asyncio.IncompleteReadError) as error:
            raise UnavailableError(f"no bridge at {path}: {error}") from None
        if kind != Type.HELLO or version < openflow.VERSION:
            writer.close()
            raise PreconditionError(f"the bridge at {path} does not speak OpenFlow 1.4; see its column `protocols`")
        connection = cls(reader, writer, on_port)
        writer.write(openflow.set_config(next(connection._xids)))
        return connection

    async def run(self) -> None:
        """Reads until the connection ends. An idle switch is asked for a sign of life; a silent one counts as gone."""
        silent = False
        try:
            while True:
                try:
                    async with asyncio.timeout(SILENCE_S):
                        header = await self._reader.readexactly(openflow.HEADER.size)
                    silent = False
                except TimeoutError:
                    if silent:
                        return
                    silent = True
                    self._writer.write(openflow.message(Type.ECHO_REQUEST, 0))
                    continue
                _, kind, length, xid = openflow.HEADER.unpack(header)
                self._take(kind, xid, await self._reader.readexactly(length - openflow.HEADER.size))
        except (OSError, asyncio.IncompleteReadError):
            return
        finally:
            self._lost = UnavailableError("the connection to Open vSwitch was lost")
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(self._lost)
            self._writer.close()

    async def flows(self) -> frozenset[SeenFlow]:
        """Our flows in the switch."""
        parts = await self._multipart(openflow.ask_flows)
        return frozenset(flow for part in parts for flow in openflow.flows(part))

    async def ports(self) -> tuple[PortDescription, ...]:
        """The bridge's ports."""
        return tuple(port for part in await self._multipart(openflow.ask_ports) for port in openflow.ports(part))

    async def apply(self, added: Sequence[Flow], deleted: Sequence[int], deleted_first: Sequence[int] = ()) -> None:
        """Adds flows and deletes those with the cookies, at once: no packet sees only a part of it.

        `deleted_first`: cookies of flows to delete before, as those of what is added are the same.

        Raises PreconditionError when the switch refuses one of them; then nothing has changed. Raises UnavailableError
        or DeadlineError when the outcome is not known.
        """
        bundle = next(self._bundles)
        sent = bytearray(openflow.bundle_control(opened := next(self._xids), bundle, Bundle.OPEN))
        xids = [opened]
        for cookie in deleted_first:
            xids.append(xid := next(self._xids))
            sent += openflow.bundle_add(xid, bundle, openflow.delete_flows(xid, cookie))
        for flow in added:
            xids.append(xid := next(self._xids))
            sent += openflow.bundle_add(xid, bundle, openflow.add_flow(xid, flow))
        for cookie in deleted:
            xids.append(xid := next(self._xids))
            sent += openflow.bundle_add(xid, bundle, openflow.delete_flows(xid, cookie))
        barrier = next(self._xids)
        sent += openflow.message(Type.BARRIER_REQUEST, barrier)
        try:
            await self._answer(barrier, bytes(sent))
            refused = [failure for xid in xids if (failure := self._failures.get(xid)) is not None]
        finally:
            for xid in xids:
                self._failures.pop(xid, None)
        if refused:
            discard = next(self._xids)
            await self._answer(discard, openflow.bundle_control(discard, bundle, Bundle.DISCARD))
            raise PreconditionError(f"Open vSwitch refused {len(refused)} of {len(xids)} changes: {refused[0]}")
        commit = next(self._xids)
        await self._answer(commit, openflow.bundle_control(commit, bundle, Bundle.COMMIT))

    def send(self, actions: Sequence[SetField | Output], frame: bytes) -> None:
        """Sends a frame of our own, without an answer."""
        self._writer.write(openflow.packet_out(next(self._xids), actions, frame))

    async def _multipart(self, ask: Callable[[int], bytes]) -> list[bytes]:
        xid = next(self._xids)
        self._parts[xid] = []
        try:
            await self._answer(xid, ask(xid))
            return self._parts[xid]
        finally:
            del self._parts[xid]

    async def _answer(self, xid: int, sent: bytes) -> bytes:
        if self._lost is not None:
            raise self._lost
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._answers[xid] = answer
        try:
            self._writer.write(sent)
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await answer
        except TimeoutError:
            raise DeadlineError(f"Open vSwitch did not answer within {ANSWER_TIMEOUT_S:g} s") from None
        finally:
            del self._answers[xid]

    def _take(self, kind: int, xid: int, body: bytes) -> None:
        match kind:
            case Type.ECHO_REQUEST:
                self._writer.write(openflow.message(Type.ECHO_REPLY, xid, body))
            case Type.PORT_STATUS:
                self._on_port(*openflow.port_status(body))
            case Type.ERROR:
                self._fail(xid, openflow.failure(body))
            case Type.MULTIPART_REPLY if xid in self._parts:
                self._parts[xid].append(body)
                if not openflow.more_follows(body):
                    self._settle(xid, body)
            case Type.BARRIER_REPLY | Type.BUNDLE_CONTROL:
                self._settle(xid, body)

    def _settle(self, xid: int, body: bytes) -> None:
        answer = self._answers.get(xid)
        if answer is not None and not answer.done():
            answer.set_result(body)

    def _fail(self, xid: int, failure: Failure) -> None:
        answer = self._answers.get(xid)
        if answer is None:
            self._failures[xid] = failure
        elif not answer.done():
            answer.set_exception(PreconditionError(f"Open vSwitch refused: {failure}"))
