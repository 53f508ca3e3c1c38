"""Sets of finished pictures, for measures over whole sets: sampling folders, class folders, `.npz`, idx files.

A set is read batch by batch: its size is no matter of memory.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..files import expanded
from .idx import IMAGES, Idx
from .image_folder import ImageFolder
from .picture_files import read_picture

BATCH = 250
SAMPLE = re.compile(r"\d{6,}_class(\d+)\.png")  # as `dcdit sample` names them


class PictureSet:
    """`count` pictures uint8 (H, W, 3) with `labels` (N,), or None where nobody knows their classes."""

    def __init__(self, name: str, count: int, labels: np.ndarray | None, parts: Iterator[np.ndarray]) -> None:
        self.name, self.count, self.labels, self.parts = name, count, labels, parts

    def batches(self) -> Iterator[np.ndarray]:
        """uint8 (n, H, W, 3), in order, once. Raises DataError for a picture of another size than the first."""
        shape = None
        for part in self.parts:
            shape = shape or part.shape[1:]
            if part.shape[1:] != shape:
                raise DataError(
                    f"{self.name}: expected pictures of {_size(shape)}, found one of {_size(part.shape[1:])}"
                )
            yield part


def open_set(path: str | Path, size: int | None = None) -> PictureSet:
    """The pictures at `path`: a folder of `dcdit sample`, of class folders, an `.npz` of ADM's layout, or idx files by
    their path (see `Idx`). Pictures in class folders are cropped and resized to `size` pixels, None: the lesser side of
    the first. Raises DataError.

    A folder's sheet of pictures, grid.png, is none of its pictures.
    """
    path = expanded(path)
    if path.suffix == ".npz":
        return _from_npz(path)
    if not path.is_dir():
        if not any(Path(f"{path}{IMAGES}{end}").is_file() for end in ("", ".gz")):
            found = "a file" if path.exists() else "nothing there"
            raise DataError(
                f"{path}: expected a folder of pictures, an .npz, or the beginning of idx files' names, found {found}"
            )
        source = Idx(path)
        parts = np.array_split(source.images, -(-len(source) // BATCH))
        return PictureSet(str(path), len(source), source.labels.astype(np.int64), map(_colours, parts))
    files = sorted(file for file in path.glob("*_class*.png") if SAMPLE.fullmatch(file.name))
    if files:
        labels = np.array([int(SAMPLE.fullmatch(file.name)[1]) for file in files])  # type: ignore[index]
        return PictureSet(str(path), len(files), labels, _read(files))
    if (path / "samples.npz").is_file():
        return _from_npz(path / "samples.npz")
    try:
        if size is None:
            size = min(read_picture(ImageFolder(path, 1).files[0][0]).size)
        folder = ImageFolder(path, size)
    except DataError as error:
        ours = "no pictures of dcdit sample (NNNNNN_classC.png) and no samples.npz"
        raise DataError(f"{path} has {ours}, and is no folder of class folders: {error}") from error
    return PictureSet(str(path), len(folder), np.array([label for _, label in folder.files]), _resized(folder))


def _from_npz(path: Path) -> PictureSet:
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
            shape, order, dtype = _header(stream)
            labels = np.load(archive.open("arr_1.npy")) if "arr_1.npy" in archive.namelist() else None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not an .npz with pictures arr_0: {error}") from error
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or order:
        raise DataError(f"{path}: expected arr_0 of uint8 (N, H, W, 3), found {dtype} {shape}")
    if not shape[0]:
        raise DataError(f"{path}: arr_0 holds no pictures")
    if labels is not None and labels.shape != shape[:1]:
        raise DataError(f"{path}: expected a label in arr_1 for each of {shape[0]} pictures, found {labels.shape}")
    return PictureSet(str(path), shape[0], labels, _stream(path))


def _header(stream) -> tuple[tuple[int, ...], bool, np.dtype]:
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(stream)
    return read[version](stream)


def _stream(path: Path) -> Iterator[np.ndarray]:
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        (count, *shape), _, _ = _header(stream)
        for first in range(0, count, BATCH):
            rows = min(BATCH, count - first)
            content = stream.read(rows * int(np.prod(shape)))
            yield np.frombuffer(content, np.uint8).reshape(rows, *shape)


def _read(files: list[Path]) -> Iterator[np.ndarray]:
    for first in range(0, len(files), BATCH):
        pictures = [np.asarray(read_picture(file)) for file in files[first : first + BATCH]]
        odd = next((i for i, picture in enumerate(pictures) if picture.shape != pictures[0].shape), None)
        if odd is not None:
            sizes = _size(pictures[0].shape), _size(pictures[odd].shape)
            raise DataError(f"{files[first + odd]}: expected {sizes[0]} as its neighbours have, found {sizes[1]}")
        yield np.stack(pictures)


def _resized(folder: ImageFolder) -> Iterator[np.ndarray]:
    for first in range(0, len(folder), BATCH):
        pictures = [folder.load(i, False)[0] for i in range(first, min(first + BATCH, len(folder)))]
        yield (127.5 * np.stack(pictures).transpose(0, 2, 3, 1) + 127.5).round().astype(np.uint8)


def _colours(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=3)


def _size(shape: Any) -> str:
    return f"{shape[0]}×{shape[1]} pixels"
