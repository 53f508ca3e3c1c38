"""Pictures in the idx files of MNIST, Fashion-MNIST and their like."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..files import expanded
from .grey import GreyPictures

IMAGES, LABELS = "-images-idx3-ubyte", "-labels-idx1-ubyte"


class Idx(GreyPictures):
    """Grey pictures (1, H, W) of PATH-images-idx3-ubyte with the class ids of PATH-labels-idx1-ubyte, each as it is or
    with `.gz`: `path` is the folder and the part before, such as /usr/share/datasets/fashion-mnist/train.

    Raises DataError for a file that is missing, damaged or of another kind, and for labels that do not pair up.
    """

    class_names = None

    def __init__(self, path: str | Path) -> None:
        self.path = str(expanded(path))
        self.images, self.labels = read_idx(self.path + IMAGES, 3), read_idx(self.path + LABELS, 1)
        if not 0 < len(self.images) == len(self.labels):
            raise DataError(f"{self.path}: expected a label for each picture, found {self.counts()}")
        self.classes = int(self.labels.max()) + 1

    def counts(self) -> str:
        """How many pictures and labels there are, in words."""
        return f"{len(self.images)} pictures and {len(self.labels)} labels"

    def describe(self) -> str:
        height, width = self.images.shape[1:]
        return f"{len(self)} pictures of {height}×{width} pixels in {self.path}, {self.classes} classes"


def read_idx(name: str, dims: int) -> np.ndarray:
    """The unsigned bytes of the idx file `name`, or of `name`.gz: uint8 with `dims` dimensions. Raises DataError.

    The format: two zero bytes, 8 for unsigned bytes, the number of dimensions, their sizes as big-endian int32, values.
    """
    file = next((file for file in (Path(name), Path(name + ".gz")) if file.is_file()), None)
    if file is None:
        raise DataError(f"there is no file {name} or {name}.gz")
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    head = 4 + 4 * dims
    if content[:4] != bytes([0, 0, 8, dims]) or len(content) < head:
        raise DataError(f"{file} must begin with 0, 0, 8, {dims} (unsigned bytes), found {list(content[:4])}")
    sizes = np.frombuffer(content, ">u4", dims, offset=4).astype(np.int64)
    if len(content) - head != sizes.prod():
        shape = "×".join(map(str, sizes))
        raise DataError(f"{file}: expected {shape} bytes after the head, found {len(content) - head}")
    return np.frombuffer(content, np.uint8, offset=head).reshape(sizes)
