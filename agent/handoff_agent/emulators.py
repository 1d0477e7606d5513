"""Probes the installed QEMU builds: release, machine types, CPR, and the CPU models that they can run here."""

import asyncio
import json
import platform
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import libvirt
import structlog
from lxml import etree

from handoff_agent.builds import Build, choose_build
from handoff_agent.children import WITH_US
from handoff_agent.monitor import Json
from handoff_agent.settings import EmulatorSettings
from handoff_common.errors import HandoffError, UnavailableError

log = structlog.get_logger()

DomainCapabilities = Callable[[str, str], Awaitable[str]]
"""virConnectGetDomainCapabilities of a slot: emulator path and virtualisation type in, XML out."""

# A build on a cold cache of a loaded machine takes seconds; one that hangs must not hold the agent's start up.
PROBE_TIMEOUT_S: Final = 20.0
# libvirt starts the binary several times for this, about 4 s under load, and then remembers it.
CAPABILITIES_TIMEOUT_S: Final = 40.0
_VIRTUALISATION_TYPES: Final = ("kvm", "qemu")
_CPR_MODE: Final = "cpr-transfer"
_CPR_OPTION: Final = "aux-ram-share"
# A QEMU without a machine, asked what it knows.
_ASKED: Final = ("-machine", "none", "-display", "none", "-nodefaults", "-no-user-config", "-qmp", "stdio")
_QUESTIONS: Final = b"""{"execute": "qmp_capabilities"}
{"execute": "query-qmp-schema"}
{"execute": "qom-list-properties", "arguments": {"typename": "none-machine"}}
{"execute": "qom-list-types", "arguments": {"implements": "device", "abstract": false}, "id": "devices"}
"""
# The greeting, and an answer to each question; the schema is one line of 200 KiB.
_ANSWERS: Final = 5
_LONGEST_ANSWER: Final = 4 << 20
_RELEASE: Final = re.compile(r"QEMU emulator version (\d+\.\d+\.\d+)")


@dataclass(frozen=True, slots=True)
class _FileStamp:
    mtime_ns: int
    size: int


class Emulators:
    """The host's QEMU builds. Empty until `probe` has run once; `probe` again picks up what was installed since."""

    def __init__(self, configured: Sequence[EmulatorSettings], capabilities: DomainCapabilities | None = None) -> None:
        """`configured` empty: the QEMU of this architecture on PATH. Without `capabilities` CPU models stay unknown."""
        self._configured = tuple(configured) or _emulator_on_path()
        self._capabilities = capabilities
        self._probed: dict[str, tuple[_FileStamp, Build]] = {}

    @property
    def builds(self) -> tuple[Build, ...]:
        """The builds that answered, in the order of the configuration."""
        return tuple(self._probed[each.path][1] for each in self._configured if each.path in self._probed)

    @property
    def releases(self) -> Mapping[str, str]:
        """Release by path."""
        return {build.path: build.release for build in self.builds}

    def choose(self, *, release: str, path: str) -> Build | None:
        """The build to run a guest of `release` under; None when none is of that release."""
        return choose_build(self.builds, release=release, path=path)

    async def probe(self) -> None:
        """Probes all builds at once. One that fails is logged and left out; one whose file is as before is not run."""
        await asyncio.gather(*(self._probe_one(each) for each in self._configured))

    async def _probe_one(self, configured: EmulatorSettings) -> None:
        try:
            stamp = _stamp(configured.path)
            known = self._probed.get(configured.path)
            if known is not None and known[0] == stamp:
                return
            release = parse_release(await _output(configured.path, "-version"))
            machine_types = parse_machine_types(await _output(configured.path, "-machine", "help"))
        except (OSError, UnavailableError) as error:
            self._probed.pop(configured.path, None)
            log.warning("QEMU build left out", name=configured.name, path=configured.path, reason=str(error))
            return
        answers = await _answers(configured.path)
        build = Build(
            path=configured.path,
            name=configured.name,
            release=release,
            machine_types=machine_types,
            cpu_models=await self._cpu_models(configured.path),
            cpr=parse_cpr(answers),
            device_types=parse_device_types(answers),
        )
        self._probed[configured.path] = (stamp, build)
        log.info("QEMU build found", name=build.name, path=build.path, release=build.release, cpr=build.cpr)

    async def _cpu_models(self, path: str) -> frozenset[str]:
        """Models usable under any type of virtualisation; libvirt checks a guest's own once more when it starts it."""
        models: frozenset[str] = frozenset()
        if self._capabilities is None:
            return models
        for virtualisation in _VIRTUALISATION_TYPES:
            try:
                async with asyncio.timeout(CAPABILITIES_TIMEOUT_S):
                    models |= parse_usable_models(await self._capabilities(path, virtualisation))
            except (libvirt.libvirtError, HandoffError, TimeoutError, etree.XMLSyntaxError) as error:
                log.info("CPU models not known", path=path, virtualisation=virtualisation, reason=str(error))
        return models


def parse_release(text: str) -> str:
    """The release in the output of `-version`. Raises UnavailableError when there is none."""
    match = _RELEASE.search(text)
    if match is None:
        raise UnavailableError(f"-version answered {text[:100]!r}")
    return match[1]


def parse_machine_types(text: str) -> frozenset[str]:
    """The names in the output of `-machine help`."""
    _, _, table = text.partition("\n")
    return frozenset(line.split()[0] for line in table.splitlines() if line.strip())


def parse_cpr(answers: str) -> bool:
    """Whether QMP's answers to a schema and a property query have what CPR needs. False for what is no QMP."""
    has_mode = has_option = False
    for _, item in _items(answers):
        # The schema hides the names of types, not those of an enum's values.
        has_mode = has_mode or _CPR_MODE in cast(Sequence[Json], item.get("values", ()))
        has_option = has_option or item.get("name") == _CPR_OPTION
    return has_mode and has_option


def parse_device_types(answers: str) -> frozenset[str]:
    """The names in QMP's answer to the question for all types of devices. Empty for what is no QMP."""
    return frozenset(str(item["name"]) for question, item in _items(answers) if question == "devices")


def _items(answers: str) -> Iterator[tuple[str, Mapping[str, Json]]]:
    """Each item of each answer that is a list, with the name of its question."""
    for line in answers.splitlines():
        try:
            answer = json.loads(line)
        except ValueError:
            continue
        items = answer.get("return") if isinstance(answer, dict) else None
        for item in items if isinstance(items, list) else ():
            yield answer.get("id", ""), item


def parse_usable_models(xml: str) -> frozenset[str]:
    """The CPU models that libvirt's domain capabilities call usable."""
    root = etree.fromstring(xml.encode())
    return frozenset(model.text or "" for model in root.iterfind("cpu/mode[@name='custom']/model[@usable='yes']"))


def _emulator_on_path() -> tuple[EmulatorSettings, ...]:
    path = shutil.which(f"qemu-system-{platform.machine()}")
    return () if path is None else (EmulatorSettings(name="system", path=path),)


def _stamp(path: str) -> _FileStamp:
    status = Path(path).stat()
    return _FileStamp(status.st_mtime_ns, status.st_size)


async def _answers(path: str) -> str:
    """What QEMU answers to our questions; empty when it answers none."""
    try:
        async with _started(path, *_ASKED, stdin=asyncio.subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(_QUESTIONS)
            # QEMU is not told to quit: it would do so before all that it has to say is written.
            answers = [await process.stdout.readline() for _ in range(_ANSWERS)]
    except (OSError, ValueError, UnavailableError) as error:
        log.info("QEMU build not asked for its abilities", path=path, reason=str(error))
        return ""
    return b"".join(answers).decode(errors="replace")


async def _output(*command: str) -> str:
    async with _started(*command, stdin=asyncio.subprocess.DEVNULL) as process:
        stdout, stderr = await process.communicate()
    if process.returncode != 0:
        reason = stderr.decode(errors="replace").strip()[-300:]
        raise UnavailableError(f"{command[1]} ended with status {process.returncode}: {reason}")
    return stdout.decode(errors="replace")


@asynccontextmanager
async def _started(*command: str, stdin: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that is gone afterwards. Raises UnavailableError when the context takes more than PROBE_TIMEOUT_S."""
    process = await asyncio.create_subprocess_exec(
        *WITH_US,  # a QEMU outlives its monitor
        *command,
        stdin=stdin,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=_LONGEST_ANSWER,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            yield process
    except TimeoutError:
        raise UnavailableError(f"no answer to {command[1]} in {PROBE_TIMEOUT_S:.0f} s") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
