"""A folder of pictures, one sub-folder for each class: its files, their order, and the skipped files."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..files import expanded
from .buckets import bucket_of
from .folders import Place, need_folder, place_of, walk
from .picture_files import SUFFIXES, check_colour, read_fitted, upright_size

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
MOST = 2**14  # pixels of a side; a picture of so many takes 3 GB
LOOKED_AT = 64  # pictures that the description opens


class ImageFolder:
    """A folder with one sub-folder of pictures per class; centre-cropped, resized to `size`, RGB: (3, size, size).

    With `buckets` each picture keeps its aspect: (3, H, W) as `bucket_of` says for sides of multiples of that many
    pixels. The headers of all files are then read at once, for `shapes`: (H, W) of each picture.

    Classes are numbered in the natural order of their names (2 before 10); links are followed, but not to folders
    above. Names that begin with a dot, such as .ipynb_checkpoints, count neither as classes nor as pictures. Other
    left-out files and links are counted in `skipped`; `shared` has a line for a folder that links put into two classes.
    Raises DataError where there is no picture, where the sub-folders are splits such as train and val, and for no size.
    """

    encoded = False

    def __init__(self, path: str | Path, size: int, background: str = "white", buckets: int = 0) -> None:
        check_colour(background)
        if not isinstance(size, int) or not 1 <= size <= MOST:
            raise DataError(f"size must be from 1 to {MOST} pixels, got {size!r}")
        self.root, self.size, self.background = expanded(path), size, background
        self.buckets = buckets
        need_folder(self.root, "a sub-folder of pictures per class")
        if buckets > size:
            raise DataError(f"data.buckets must be at most data.size, {size} pixels, got {buckets}")
        self.skipped: Counter[str] = Counter()
        self.class_names: list[str] = []
        self.files: list[tuple[Path, int]] = []
        self.shared: list[str] = []
        entries = sorted((entry for entry in self.root.iterdir() if not entry.name.startswith(".")), key=_natural)
        folders = [entry for entry in entries if entry.is_dir()]
        if folders and {folder.name.lower() for folder in folders} <= SPLITS:
            names = ", ".join(folder.name for folder in folders)
            raise DataError(f"{self.root} holds splits, not classes: {names}; give one of them, such as {folders[0]}")
        root = self.root.resolve()
        above = {place_of(folder) for folder in (root, *root.parents)}
        owners: dict[Place, str] = {}
        for folder in folders:
            files = [file for file in self._below(folder, above, owners) if self._is_picture(file)]
            if not files:
                self.skipped["folder without pictures"] += 1
                continue
            self.files += [(file, len(self.class_names)) for file in files]
            self.class_names.append(folder.name)
        for entry in entries:
            if not entry.is_dir():
                beside = entry.suffix.lower() in SUFFIXES
                self.skipped["picture beside the class folders" if beside else _kind(entry)] += 1
        if not self.files:
            left_out = f"; left out: {self._left_out()}" if self.skipped else ""
            raise DataError(
                f"{self.root} has no images: expected a sub-folder per class with {', '.join(SUFFIXES)} files{left_out}"
            )
        self.classes = len(self.class_names)
        self.shapes = [(size, size)] * len(self.files)
        if buckets:
            sizes = (upright_size(file) or (size, size) for file, _ in self.files)
            self.shapes = [bucket_of(*own, size, buckets) for own in sizes]

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int, flip: bool) -> tuple[np.ndarray, int]:
        file, label = self.files[index]
        pixels = read_fitted(file, self.shapes[index], self.background)
        return (pixels[..., ::-1] if flip else pixels), label

    def describe(self) -> str:
        """One line: pictures, classes, sizes and modes of some files, and the skipped files."""
        looked = [
            self.files[i][0] for i in np.linspace(0, len(self.files) - 1, min(LOOKED_AT, len(self.files))).astype(int)
        ]
        text = f"{len(self.files)} pictures in {self.root}, {len(self.class_names)} classes ({_some(self.class_names)})"
        text += f"; {looks(looked)}"
        if len(looked) < len(self.files):
            text += f" ({len(looked)} looked at)"
        if self.buckets:
            text += f"; {len(set(self.shapes))} buckets"
        text += f"; left out: {self._left_out()}" if self.skipped else ""
        return "; ".join([text, *self.shared])

    def fingerprint(self) -> str:
        """A hash of the files' places inside the folder, their sizes in bytes and their classes."""
        digest = hashlib.sha256()
        for file, label in self.files:
            digest.update(f"{file.relative_to(self.root).as_posix()}\0{file.stat().st_size}\0{label}\n".encode())
        return digest.hexdigest()[:16]

    def _below(self, folder: Path, above: set[Place], owners: dict[Place, str]) -> list[Path]:
        """Files of a class in natural order; `owners` are the classes in which folders were seen first."""
        files: list[Path] = []
        for where, place, inside in walk(folder, above):
            files += inside
            if place in above:
                self.skipped["link to a folder above"] += 1
            elif owners.setdefault(place, folder.name) != folder.name:
                self.shared.append(f"{where} is in the class {owners[place]} too")
        return sorted(files, key=lambda file: [_natural(part) for part in file.relative_to(folder).parts])

    def _is_picture(self, file: Path) -> bool:
        if file.suffix.lower() not in SUFFIXES:
            self.skipped[_kind(file)] += 1
            return False
        if not file.is_file():
            self.skipped["link to nothing" if file.is_symlink() else "no regular file"] += 1
            return False
        return True

    def _left_out(self) -> str:
        return ", ".join(f"{count} × {reason}" for reason, count in sorted(self.skipped.items()))


def looks(files: list[Path]) -> str:
    """Smallest and largest size and the colour modes of readable files, from their headers."""
    from PIL import Image

    sizes, modes = [], Counter()
    for file in files:
        try:
            with Image.open(file) as image:
                sizes.append(image.size)
                modes[image.mode] += 1
        except Exception:  # reported where the file is read whole
            modes["unreadable"] += 1
    shown = sorted(sizes, key=lambda size: size[0] * size[1])
    ends = " to ".join(f"{width}×{height}" for width, height in dict.fromkeys((shown[0], shown[-1]))) if shown else ""
    return ", ".join(filter(None, [ends, *(f"{count} {mode}" for mode, count in modes.most_common())]))


def _natural(name: Path | str) -> tuple:
    text = name if isinstance(name, str) else name.name
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", text))), text


def _kind(file: Path) -> str:
    return f"{file.suffix.lower()} file" if file.suffix else "file without extension"


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
