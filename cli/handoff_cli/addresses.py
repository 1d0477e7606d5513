"""Which controllers to ask: the option, the environment or a configuration file, in this order."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from handoff_common.errors import InvalidArgumentError

VARIABLE = "HANDOFF_CONTROLLER"
SYSTEM_FILE = Path("/etc/handoff/cli.toml")


def settings_files(environ: Mapping[str, str]) -> tuple[Path, ...]:
    """Where cli.toml is looked for; the first one that exists counts."""
    home = Path(environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME") or "/") / ".config")
    return (home / "handoff" / "cli.toml", SYSTEM_FILE)


def find_controllers(
    option: str | None, environ: Mapping[str, str] = os.environ, files: Sequence[Path] | None = None
) -> tuple[str, ...]:
    """The addresses to ask, in order. Raises InvalidArgumentError, which says how to set them, when there are none."""
    files = settings_files(environ) if files is None else files
    for where, text in (("--controller", option), (VARIABLE, environ.get(VARIABLE))):
        if text and text.strip():
            return checked([part.strip() for part in text.split(",") if part.strip()], where)
    for file in files:
        if file.is_file():
            return checked(_from_file(file), str(file))
    raise InvalidArgumentError(
        f"no controller given: use --controller HOST:PORT, set {VARIABLE}=HOST:PORT[,HOST:PORT…], "
        f'or write controllers = ["HOST:PORT"] to {" or ".join(str(file) for file in files)}'
    )


def _from_file(file: Path) -> tuple[str, ...]:
    # pydantic takes a third of the command's start; whoever sets the variable need not wait for it.
    from handoff_cli.settings import CliSettings  # noqa: PLC0415
    from handoff_common.config import load_settings  # noqa: PLC0415

    return load_settings(file, CliSettings).controllers


def checked(addresses: Sequence[str], where: str) -> tuple[str, ...]:
    """The addresses, without doubles. Raises InvalidArgumentError for one that can't be an address."""
    if not addresses:
        raise InvalidArgumentError(f"{where}: no address given; use HOST:PORT or unix:/PATH")
    for address in addresses:
        host, _, port = address.rpartition(":")
        is_socket = address.startswith("unix:/")
        if not is_socket and not (host and port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
            raise InvalidArgumentError(f"{where}: {address!r} is not an address; use HOST:PORT or unix:/PATH")
    return tuple(dict.fromkeys(addresses))
