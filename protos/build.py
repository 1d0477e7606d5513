"""hatchling's build hook: generates the Python code of the protos into build/gen, at every `uv sync` that needs it."""

from pathlib import Path
from typing import Any

import grpc_tools
from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ROOT / "build" / "gen"


def generate() -> None:
    """Compiles every .proto under protos/ to messages, stubs and types. Raises RuntimeError when protoc refuses."""
    protos = ROOT / "protos"
    GENERATED.mkdir(parents=True, exist_ok=True)
    sources = sorted(str(path.relative_to(protos)) for path in protos.rglob("*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    arguments = [
        "protoc",
        f"-I{protos}",
        f"-I{well_known}",
        *(f"--{kind}_out={GENERATED}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")),
        *sources,
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError(f"protoc could not compile {', '.join(sources)}")


class GenerateProtos(BuildHookInterface):
    """hatchling's hook: the generated code exists before files are collected, also for an editable install."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generates the code; version and build_data are hatchling's."""
        generate()
