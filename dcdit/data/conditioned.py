"""Latents with their text: a folder of safetensors files, one for each sample, in batches of one shape."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from ..errors import DataError

Sample = dict[str, torch.Tensor]


class Conditioned:
    """Samples of `folder`: FILE.safetensors with `latents` (C, H, W) or (C, F, H, W), as a model takes them, `text`
    (S, D), and where `pooled` says so `pooled` (P).

    Samples of one shape share batches; with `ragged` only the latents' shapes count, and texts may differ in length.
    `kinds` has the first file of each set of shapes. Raises DataError for a folder without such files, for a file of
    another kind, and for a sample with NaN or infinity when it is read.
    """

    class_names = None

    def __init__(self, folder: str, pooled: bool = False, ragged: bool = False) -> None:
        self.folder = Path(folder).expanduser()
        self.names = ("latents", "text", *(["pooled"] if pooled else []))
        self.files = sorted(self.folder.rglob("*.safetensors"))
        if not self.files:
            raise DataError(f"{folder} must be a folder of safetensors files with {', '.join(self.names)}; it has none")
        self.buckets: dict[tuple, list[int]] = defaultdict(list)
        self.kinds: dict[tuple[tuple[int, ...], ...], Path] = {}
        for index, file in enumerate(self.files):
            shapes = self._shapes(file)
            self.kinds.setdefault(tuple(shapes.values()), file)
            self.buckets[shapes["latents"], () if ragged else shapes["text"]].append(index)

    def _shapes(self, file: Path) -> dict[str, tuple[int, ...]]:
        """From the file's header."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as tensors:
                slices = {name: tensors.get_slice(name) for name in self.names if name in tensors.keys()}
                found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        except (OSError, SafetensorError) as error:
            raise DataError(f"{file} is not a safetensors file that can be read: {error}") from error
        for name in self.names:
            sides = {"latents": (3, 4), "text": (2,), "pooled": (1,)}[name]
            shape, dtype = found.get(name, ((), ""))
            if len(shape) not in sides:
                raise DataError(f"{file} must have {name} of {sides[0]} dimensions, got {shape or 'none'}")
            if 0 in shape or not dtype.startswith(("F", "BF")):
                raise DataError(f"{file} must have {name} of floating-point numbers, no side of 0, got {dtype} {shape}")
        return {name: found[name][0] for name in self.names}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self.files[index]
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{file} is not a safetensors file that can be read: {error}") from error
        sample = {name: tensors[name].float() for name in self.names}
        for name, values in sample.items():
            if not values.isfinite().all():
                raise DataError(f"{file} must have finite {name}, got NaN or infinity")
        return sample

    def fingerprint(self) -> str:
        """A hash of the files' places inside the folder and their sizes in bytes."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.relative_to(self.folder).as_posix()}\0{file.stat().st_size}\n".encode())
        return digest.hexdigest()[:16]

    def batches(self, size: int) -> int:
        """How many an epoch has."""
        return sum(-(-len(indices) // size) for indices in self.buckets.values())

    def epoch(self, size: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Batches (size,) of indices in which each sample is there, in a random order.

        The last batch of a shape is filled up with others of that shape, or the same ones again.
        """
        batches = []
        for indices in self.buckets.values():
            order = rng.permutation(indices)
            count = -(-len(order) // size)
            batches += np.split(np.resize(order, count * size), count)
        return [batches[place] for place in rng.permutation(len(batches))]
