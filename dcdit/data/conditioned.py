"""Latents with their text: a folder of samples, in batches of one shape."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import numpy as np
import torch

from ..errors import DataError
from ..files import expanded
from .folders import need_folder
from .parquet import Row
from .sample_files import SampleFile, find_samples

Sample = dict[str, torch.Tensor]


class Conditioned:
    """Samples of `folder`, as `find_samples` finds them: `latents` (C, H, W) or (C, F, H, W), as a model takes them,
    `text` (S, D), and where `pooled` says so `pooled` (P).

    Samples of one shape share batches; with `ragged` only the latents' shapes count, and texts may differ in length.
    `kinds` has the name of the first sample of each set of shapes. Raises DataError for a folder without samples, for
    one of another kind, and when one with NaN or infinity is read.
    """

    class_names = None

    def __init__(self, folder: str, pooled: bool = False, ragged: bool = False) -> None:
        self.names = ("latents", "text", *(["pooled"] if pooled else []))
        place = expanded(folder)
        wanted = f"safetensors, npz, tar or parquet files with {', '.join(self.names)}"
        need_folder(place, wanted)
        self.files = find_samples(place, self.names)
        if not self.files:
            raise DataError(f"{folder} must be a folder of {wanted}; it has none")
        self.buckets: dict[tuple, list[int]] = defaultdict(list)
        self.kinds: dict[tuple[tuple[int, ...], ...], str] = {}
        for index, file in enumerate(self.files):
            shapes = self._shapes(file)
            self.kinds.setdefault(tuple(shapes.values()), file.name)
            self.buckets[shapes["latents"], () if ragged else shapes["text"]].append(index)

    def _shapes(self, file: SampleFile | Row) -> dict[str, tuple[int, ...]]:
        """From the file's header."""
        found = file.header(self.names)
        for name in self.names:
            sides = {"latents": (3, 4), "text": (2,), "pooled": (1,)}[name]
            shape, dtype = found.get(name, ((), ""))
            if len(shape) not in sides:
                raise DataError(f"{file.name} must have {name} of {sides[0]} dimensions, got {shape or 'none'}")
            if 0 in shape or not dtype.startswith(("F", "BF")):
                wanted = f"{name} of floating-point numbers, no side of 0"
                raise DataError(f"{file.name} must have {wanted}, got {dtype} {shape}")
        return {name: found[name][0] for name in self.names}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        file = self.files[index]
        sample = {name: values.float() for name, values in file.load(self.names).items()}
        for name, values in sample.items():
            if not values.isfinite().all():
                raise DataError(f"{file.name} must have finite {name}, got NaN or infinity")
        return sample

    def fingerprint(self) -> str:
        """A hash of the samples' places inside the folder and their sizes in bytes."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.place}\0{file.size}\n".encode())
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
