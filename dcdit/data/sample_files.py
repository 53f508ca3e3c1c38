"""Samples of tensors on disk: a safetensors or npz file each, members of a tar shard as WebDataset has them, or rows of
parquet."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import torch

from ..errors import DataError
from .folders import walk
from .npy import Header, read_header, read_tensor, to_tensor
from .parquet import Groups, Row, find_rows

BROKEN = (OSError, ValueError, TypeError, KeyError, EOFError, MemoryError)  # a header may ask for any amount of memory


@dataclass(frozen=True)
class Span:
    """Bytes [start, start + size) of a file."""

    file: Path
    start: int
    size: int

    def read(self, start: int, size: int) -> bytes:
        """So many bytes from `start` within it."""
        with open(self.file, "rb") as stream:
            stream.seek(self.start + start)
            return stream.read(size)

    def stream(self) -> BinaryIO:
        """All of it: the file itself where it is one's own."""
        return io.BytesIO(self.read(0, self.size)) if self.start else open(self.file, "rb")


@dataclass(frozen=True)
class SampleFile:
    """One sample. `name` is for messages, `place` that inside the folder.

    `parts` are its bytes by the end of their name: safetensors, npz, or TENSOR.npy for each tensor. The methods raise
    DataError for bytes that cannot be read.
    """

    name: str
    place: str
    parts: dict[str, Span]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(span.size for span in self.parts.values())

    def header(self, names: tuple[str, ...]) -> Header:
        """Of those tensors that are there; their data is not read."""
        return self._each(
            names, _safetensors_header, _npz_header, lambda span: read_header(io.BytesIO(span.read(0, 4096)))
        )

    def load(self, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Those tensors, as they are."""
        return self._each(names, _load_safetensors, _load_npz, lambda span: read_tensor(span.stream()))

    def _each(self, names: tuple[str, ...], safetensors: Callable, npz: Callable, npy: Callable) -> dict[str, Any]:
        from safetensors import SafetensorError

        try:
            found = {}
            for end, read in (("safetensors", safetensors), ("npz", npz)):
                if end in self.parts:
                    found |= read(self.parts[end], names)
            return found | {name: npy(self.parts[f"{name}.npy"]) for name in names if f"{name}.npy" in self.parts}
        except (*BROKEN, SafetensorError, zipfile.BadZipFile) as error:
            raise DataError(f"{self.name} cannot be read: {error}") from error


def find_samples(folder: Path, names: tuple[str, ...]) -> list[SampleFile | Row]:
    """All samples below a folder, through links: files in the order of their paths, members and rows in that of their
    shard.

    Members whose names are equal up to the first dot make a sample. Other files and members are left out, and names
    that begin with a dot. Raises DataError for a shard that is no tar or no parquet file, and ConfigError for parquet
    without pyarrow.
    """
    samples: list[SampleFile | Row] = []
    groups = Groups()
    for file in sorted(file for *_, files in walk(folder) for file in files):
        place = file.relative_to(folder).as_posix()
        if file.suffix in (".safetensors", ".npz"):
            if not file.is_file():
                raise DataError(f"{file} cannot be read: it is a link to nothing, or no regular file")
            part = Span(file, 0, file.stat().st_size)
            samples.append(SampleFile(str(file), place, {file.suffix[1:]: part}))
        elif file.suffix == ".tar":
            samples += [SampleFile(f"{file}:{key}", f"{place}:{key}", parts) for key, parts in _members(file, names)]
        elif file.suffix == ".parquet":
            samples += find_rows(file, place, groups)
    return samples


def _members(shard: Path, names: tuple[str, ...]) -> list[tuple[str, dict[str, Span]]]:
    ends = {"safetensors", "npz", *(f"{name}.npy" for name in names)}
    found: dict[str, dict[str, Span]] = {}
    try:
        if shard.stat().st_size % tarfile.BLOCKSIZE:  # within a header tarfile takes it for the end
            raise tarfile.ReadError(f"truncated, its size is no multiple of {tarfile.BLOCKSIZE} bytes")
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                stem, _, end = path.name.partition(".")
                if member.isreg() and end in ends:
                    key = (path.parent / stem).as_posix()
                    found.setdefault(key, {})[end] = Span(shard, member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{shard} is not a tar that can be read: {error}") from error
    return list(found.items())


def _safetensors_header(span: Span, names: tuple[str, ...]) -> Header:
    length = int.from_bytes(span.read(0, 8), "little")
    if length > span.size - 8:
        raise ValueError("it is no safetensors file, or truncated")
    header = json.loads(span.read(8, length))
    return {name: (tuple(header[name]["shape"]), header[name]["dtype"]) for name in names if name in header}


def _load_safetensors(span: Span, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    tensors = load(span.read(0, span.size))
    return {name: tensors[name] for name in names if name in tensors}


def _npz_header(span: Span, names: tuple[str, ...]) -> Header:
    found = {}
    with span.stream() as stream, zipfile.ZipFile(stream) as archive:
        for name in names:
            if f"{name}.npy" in archive.namelist():
                with archive.open(f"{name}.npy") as member:
                    found[name] = read_header(member)
    return found


def _load_npz(span: Span, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    with span.stream() as stream, np.load(stream, allow_pickle=False) as arrays:
        return {name: to_tensor(arrays[name]) for name in names if name in arrays}
