"""Where an export is: "nbd://10.20.0.2:49153/NAME", or "nbds://…" where it is given by TLS only."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from handoff_common.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class ExportUri:
    """An NBD export on a TCP port."""

    host: str
    port: int
    name: str
    tls: bool = False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'nbds' if self.tls else 'nbd'}://{host}:{self.port}/{self.name}"


def parse_uri(uri: str) -> ExportUri:
    """Reads a URI. Raises InvalidArgumentError."""
    try:
        parts = urlsplit(uri)
        host, port, name = parts.hostname, parts.port, parts.path.removeprefix("/")
    except ValueError:
        host, port, name = None, None, ""
    if host is None or port is None or not name or parts.scheme not in ("nbd", "nbds"):
        raise InvalidArgumentError(f"{uri!r} is no export of a disk, such as nbd://10.20.0.2:49153/NAME")
    return ExportUri(host, port, name, tls=parts.scheme == "nbds")
