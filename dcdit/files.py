"""Files that are on the disk whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to, which becomes `file` at the end; after an error `file` is as it was."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def sync(file: Path) -> None:
    """Wait until what was written is on the disk."""
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
