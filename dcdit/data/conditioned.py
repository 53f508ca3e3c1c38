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
    Raises DataError for a folder without such files, and for a file of another kind.
    """

    class_names = None

    def __init__(self, folder: str, pooled: bool = False, ragged: bool = False) -> None:
        self.folder = Path(folder).expanduser()
        self.names = ("latents", "text", *(["pooled"] if pooled else []))
        self.files = sorted(self.folder.rglob("*.safetensors"))
        if not self.files:
            raise DataError(f"{folder} must be a folder of safetensors files with {', '.join(self.names)}; it has none")
        self.buckets: dict[tuple, list[int]] = defaultdict(list)
        for index, file in enumerate(self.files):
            shapes = self._shapes(file)
            self.buckets[shapes["latents"], () if ragged else shapes["text"]].append(index)

    def _shapes(self, file: Path) -> dict[str, tuple[int, ...]]:
        """From the file's header."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as tensors:
                found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
        except SafetensorError as error:
            raise DataError(f"{file} is not a safetensors file: {error}") from error
        for name in self.names:
            sides = {"latents": (3, 4), "text": (2,), "pooled": (1,)}[name]
            if len(found.get(name, ())) not in sides:
                raise DataError(f"{file} must have {name} of {sides[0]} dimensions, got {found.get(name, 'none')}")
        return found

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        from safetensors.torch import load_file

        tensors = load_file(self.files[index])
        return {name: tensors[name].float() for name in self.names}

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
