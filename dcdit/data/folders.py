"""The files below a folder, through links."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from pathlib import Path

from ..errors import DataError

Place = tuple[int, int]  # device and number of a folder, whatever its names


def need_folder(path: Path, content: str) -> None:
    """Raise DataError where `path` is no folder."""
    if not path.is_dir():
        raise DataError(f"{path} is {'a file' if path.exists() else 'not there'}, expected a folder with {content}")


def place_of(folder: str | Path) -> Place:
    """Equal for all links to a folder."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def walk(folder: Path, above: Container[Place] = ()) -> Iterator[tuple[Path, Place, list[Path]]]:
    """The folders from `folder` down, through links and each once, with the files in each.

    Names that begin with a dot are left out. A folder of `above` comes without files, and nothing below it follows.
    Raises DataError for a folder that cannot be read.
    """
    seen: set[Place] = set()

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error

    for where, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        place = place_of(where)
        if place in seen or place in above:
            folders[:] = names[:] = []
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if place not in seen:
            yield Path(where), place, [Path(where, name) for name in names if not name.startswith(".")]
        seen.add(place)
