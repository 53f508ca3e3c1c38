"""Files that are on the disk whole, or not at all; folders that one run at a time writes to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import DataError

WEIGHTS = "model.safetensors"  # of our checkpoints, beside their config.json
KINDS = ".pt", ".pth", ".safetensors", ".json", ".yaml", ".csv", ".npz", ".png"  # endings that say what a file is
# Files that stand in the folder of a checkpoint, of ours or of diffusers, and in none that a command writes into.
CHECKPOINTS = WEIGHTS, "diffusion_pytorch_model.safetensors", "model_index.json"


def expanded(name: str | Path) -> Path:
    """The path with ~ and ~user replaced. Raises DataError where there is no such home folder, and for no path."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise DataError(f"{name}: there is no such home folder, give the whole path") from error
    except TypeError as error:
        raise DataError(f"a file or folder must be given by its name, got a {type(name).__name__}") from error


def read_text(file: Path) -> str:
    """UTF-8 that a person may have written: some editors put a byte order mark in front, which is no text."""
    return file.read_text(encoding="utf-8-sig")


def read_json(file: Path) -> Any:
    """The values of a JSON file. Raises ValueError where it is none, and OSError."""
    try:
        return json.loads(read_text(file))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


@contextmanager
def naming(place: Path) -> Iterator[None]:
    """Of an OSError that names no file, as a full disk's, the place that was written to."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(place)) from error


@contextmanager
def replacing(file: Path, durable: bool = True) -> Iterator[Path]:
    """A path to write to, which becomes `file` at the end; after an error `file` is as it was.

    `durable` waits for the disk: then a loss of power leaves a whole file too, not only a kill.
    """
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with naming(file):
            yield temporary
            if durable:
                sync(temporary)
            os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def sync(file: Path) -> None:
    """Wait until all writes are on the disk."""
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())


def check_folder(directory: Path, data: str | Path = "") -> Path:
    """The folder, which need not be there yet. Raises DataError where it cannot be made or written, where it is that of
    a checkpoint, and where it is the folder `data` or inside of it, whose next reader would take what is written for
    data."""
    if data and expanded(data).resolve() in (directory.resolve(), *directory.resolve().parents):
        raise DataError(f"cannot write {directory}: it must be a folder outside of the data, {data}")
    place = directory.absolute()
    while not place.exists() and place != place.parent:
        if place.is_symlink():
            raise DataError(f"cannot write {directory}: {place} is a link to nothing")
        place = place.parent
    if not place.is_dir():
        raise DataError(f"cannot write {directory}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise DataError(f"cannot write {directory}: no permission to write in {place}")
    if any((directory / name).exists() for name in CHECKPOINTS):
        raise DataError(f"cannot write {directory}: it is a checkpoint's folder; give another output")
    return directory


def check_file(path: Path, *endings: str) -> None:
    """Raise DataError where a file with none of these endings is there, which a slip would replace, or where the name
    ends as that of another kind."""
    kind = f"{' or '.join(endings)} file; give another name"
    if path.is_file() and path.suffix not in endings:
        raise DataError(f"cannot write {path}: it is there and is no {kind}")
    if path.suffix in KINDS and path.suffix not in endings:
        raise DataError(f"cannot write {path}: what is written is a {kind}")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the operating system frees it when the process ends. Raises DataError.

    A file system or operating system without locks on folders lets everyone in.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another run is writing to {directory}: wait for it, or give another output") from error
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
