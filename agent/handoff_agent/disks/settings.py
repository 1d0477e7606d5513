"""What a host does with disks of others."""

from dataclasses import dataclass
from pathlib import Path

from handoff_agent.disks.storage_daemon import Address


@dataclass(frozen=True, slots=True)
class StorageSettings:
    """What this host does with disks of others."""

    folder: Path
    """Of the storage daemons, on a memory file system."""
    address: Address
    owner: str
    """User that images belong to."""
    tls_credentials: str = ""
    """Folder with x509 credentials of this host, as server and as client; empty: no TLS."""
