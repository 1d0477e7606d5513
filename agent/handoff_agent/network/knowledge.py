"""What the agent must know of the network beyond its own life, on disk: what it was told, and what moves here."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import structlog

from handoff_agent.files import replace_file
from handoff_agent.network.treatment import Attachment, Key

log = structlog.get_logger()

_TOLD: Final = "told.json"
_MOVES: Final = "moves.json"


@dataclass(frozen=True, slots=True)
class Told:
    """The leader's word."""

    term: int = 0
    generation: int = 0
    attachments: tuple[Attachment, ...] = ()


@dataclass(frozen=True, slots=True)
class Moves:
    """What handoffs make of guests here. Keys are UUIDs."""

    coming: Mapping[str, tuple[Attachment, ...]] = field(default_factory=dict)
    """Their ports by their own definition: the leader may not have told of them yet."""
    leaving: Mapping[str, str] = field(default_factory=dict)
    """Guests that are paused here: tunnel endpoint of their destination, HERE for the other slot."""
    taps: Mapping[str, str] = field(default_factory=dict)
    """Interfaces of ports that are here, by "tunnel/mac"."""


class Store:
    """Two files. Blocking: call it on a thread."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "network"
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def load(self) -> tuple[Told, Moves]:
        """What was kept; nothing where that can't be read."""
        told = self._read(_TOLD)
        moves = self._read(_MOVES)
        try:
            return (
                Told(told.get("term", 0), told.get("generation", 0), _attachments(told.get("attachments", []))),
                Moves(
                    {uuid: _attachments(ports) for uuid, ports in moves.get("coming", {}).items()},
                    moves.get("leaving", {}),
                    moves.get("taps", {}),
                ),
            )
        except (KeyError, TypeError, AttributeError) as error:
            log.error("what is kept of the network is not what we write", folder=str(self._folder), error=str(error))
            return Told(), Moves()

    def save_told(self, told: Told) -> None:
        """On disk on return."""
        replace_file(self._folder / _TOLD, json.dumps(dataclasses.asdict(told)))

    def save_moves(self, moves: Moves) -> None:
        """Outlives the agent; not the host, for neither do its guests."""
        replace_file(self._folder / _MOVES, json.dumps(dataclasses.asdict(moves)), durable=False)

    def _read(self, name: str) -> dict[str, Any]:
        path = self._folder / name
        try:
            values: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            log.error("what is kept of the network can't be read", path=str(path), error=str(error))
            return {}
        return values


def _attachments(values: list[dict[str, Any]]) -> tuple[Attachment, ...]:
    return tuple(
        Attachment(
            **{**value, "key": Key(**value["key"]), "addresses": tuple(value["addresses"])},
        )
        for value in values
    )
