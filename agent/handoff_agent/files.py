"""Files that are never seen half written."""

import os
from pathlib import Path


def replace_file(path: Path, text: str, *, durable: bool = True) -> None:
    """Writes a file in the place of the old one, at once. `durable`: it is on disk on return."""
    temporary = path.with_suffix(".new")
    with temporary.open("w") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)
    if durable:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
