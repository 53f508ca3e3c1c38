"""Which samples, noises, times and labels each training step sees: a function of (seed, step, position) alone.

Nothing random is saved with a checkpoint, and splitting a batch over processes changes nothing.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..data.sources import Source
from ..errors import ConfigError, DataError
from ..interrupts import ignored
from ..model.density import Density
from .objectives import DDPM, SUB_BATCH, FlowMatching
from .parts import cuts

# Streams of random numbers; each has its own key.
_SAMPLE, _ORDER, _STEP, _DENSITY, GATES = range(5)


def generator(seed: int, stream: int, step: int = 0, position: int = 0) -> np.random.Generator:
    """Random numbers that depend on the four arguments alone, so that nothing has to be saved to resume (Philox)."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, position, step]))


def draw_drop_fraction(seed: int, step: int, choices: Sequence[float], warmup: int) -> float:
    """ρ or budget of a step, the same on every rank: 0 in the first `warmup` steps, then one of `choices`."""
    if step < warmup:
        return 0.0
    return float(choices[int(generator(seed, _STEP, step).integers(len(choices)))])


class TrainingStream(Dataset):
    """An endless training set: every item is a sample with its noise, time and label.

    A step takes the next `batch_size` items, or, with `tokens`, as many as have so many latent cells together.

    Every item is {"image": (C, H, W), "noise": latent shape, "t": (), "y": ()}, a function of (seed, item) only. With
    `unit`, the pixels of a latent cell's side, the noise has the image's own shape in cells. Each epoch is a
    permutation of the source. With `skip_broken` the next readable picture of the permutation stands in the place of an
    unreadable one, which is named once on stderr.
    """

    def __init__(
        self,
        source: Source,
        objective: FlowMatching | DDPM,
        latent_shape: tuple[int, ...],
        null_label: int,
        *,
        seed: int = 0,
        batch_size: int,
        label_drop: float = 0.0,
        flip: bool = False,
        skip_broken: bool = False,
        tokens: int = 0,
        unit: int = 0,
    ) -> None:
        self.source, self.objective, self.latent_shape, self.null_label = source, objective, latent_shape, null_label
        self.seed, self.batch_size, self.label_drop, self.flip = seed, batch_size, label_drop, flip
        self.skip_broken, self.broken = skip_broken, set[int]()
        self.tokens, self.unit = tokens, unit
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def cells(self) -> np.ndarray:
        """Latent cells of each item of the source."""
        if not self.unit:
            return np.full(len(self.source), np.prod(self.latent_shape[1:]))
        return np.prod(self.source.shapes, axis=1) // self.unit**2  # type: ignore[attr-defined]

    def steps(self, start: int, stop: int) -> Iterator[Sequence[int]]:
        """The items of the steps [start, stop)."""
        if self.tokens:
            yield from itertools.islice(self._steps_by_tokens(), start, stop)
        else:
            yield from (range(step * self.batch_size, (step + 1) * self.batch_size) for step in range(start, stop))

    def _steps_by_tokens(self) -> Iterator[Sequence[int]]:
        """Items in their order, cut where the next would be too many. A batch may go over the end of an epoch."""
        cells, count = self.cells(), len(self.source)
        items, costs = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        for epoch in itertools.count():
            items = np.append(items, np.arange(epoch * count, (epoch + 1) * count))
            costs = np.append(costs, cells[self._permutation(epoch)])
            ends, first = costs.cumsum(), 0
            while True:
                taken = ends[first - 1] if first else 0
                last = int(np.searchsorted(ends, taken + self.tokens, "right"))
                if last == len(ends):
                    break
                yield items[first:last].tolist()
                first = last
            items, costs = items[first:], costs[first:]

    def collate(self, items: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        """A batch of items: tensors, but lists of images and noises where they may differ in size."""
        batch: dict[str, Any] = {key: [item[key] for item in items] for key in items[0]}
        return {key: v if self.unit and key in ("image", "noise") else torch.stack(v) for key, v in batch.items()}

    def _permutation(self, epoch: int) -> np.ndarray:
        return generator(self.seed, _ORDER, epoch).permutation(len(self.source))

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        epoch, place = divmod(item, len(self.source))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self._permutation(epoch)
        rng = generator(self.seed, _SAMPLE, *divmod(item, self.batch_size))
        t = self.draw_time(rng, item // self.batch_size)
        drop_label, flip = rng.random(2) < (self.label_drop, 0.5 * self.flip)
        image, label = self._load(place, bool(flip))
        grid = [side // self.unit for side in image.shape[1:]] if self.unit else self.latent_shape[1:]
        noise = rng.standard_normal((self.latent_shape[0], *grid), dtype=np.float32)
        if not 0 <= label < self.null_label:
            item, files = int(self.order[place]), getattr(self.source, "names", None)
            name = files[item] if files else item
            raise DataError(f"class id {label} of item {name} is outside [0, {self.null_label})")
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image)),
            "noise": torch.from_numpy(noise),
            "t": torch.tensor(t, dtype=torch.float32),
            "y": torch.tensor(self.null_label if drop_label else label),
        }

    def draw_time(self, rng: np.random.Generator, step: int) -> float:
        """The time of a sample of this step."""
        return self.objective.draw_time(rng)

    def _load(self, place: int, flip: bool) -> tuple[np.ndarray, int]:
        for shift in range(len(self.source)):
            index = int(self.order[(place + shift) % len(self.source)])
            try:
                return self.source.load(index, flip)
            except DataError as error:
                if not self.skip_broken:
                    raise DataError(f"{error}; data.skip_broken=true leaves out what cannot be read") from error
                if index not in self.broken:
                    print(f"skipped: {error}", file=sys.stderr)
                self.broken.add(index)
        raise DataError("none of the data's items can be read")


class DensityStream(TrainingStream):
    """A training set with times that ask for one sparse grid at each step, common to the batch.

    A time drawn for the step chooses the grid, and each sample draws until its time asks for it too: over all steps the
    times are distributed as the objective draws them.
    """

    def __init__(self, density: Density, grid: tuple[int, int], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.density, self.grid = density, grid

    def draw_time(self, rng: np.random.Generator, step: int) -> float:
        """The time of a sample of this step, one that asks for the step's sparse grid."""
        first = self.objective.draw_time(generator(self.seed, _DENSITY, step))
        size = self.density.size(first, self.grid)
        while self.density.size(t := self.objective.draw_time(rng), self.grid) != size:
            pass
        return t


def batches(
    stream: TrainingStream,
    start: int,
    stop: int,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of the steps [start, stop): the `rank`-th of `ranks` slices of each global batch, equal ones, or those of
    `cuts` where batches are by tokens.

    A batch has the keys of an item, of tensors; "image" and "noise" are lists where the stream has a `unit`.
    With `pin_memory` a copy to a GPU with `non_blocking=True` does not wait for the steps before it.
    """

    def share(items: Sequence[int]) -> Sequence[int]:
        ends = cuts(len(items), ranks) if stream.tokens else range(0, len(items) + 1, len(items) // ranks)
        return items[ends[rank] : ends[rank + 1]]

    loader = DataLoader(
        stream,
        batch_sampler=map(share, stream.steps(start, stop)),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=ignored,
        collate_fn=stream.collate,
    )
    try:
        yield from loader
    except DataError as error:
        # A worker process sends its whole traceback; the last line is its message.
        raise DataError(str(error).splitlines()[-1].removeprefix("dcdit.errors.DataError: ")) from error


def check_tokens(stream: TrainingStream, parts: int) -> None:
    """Raise ConfigError where batches are by tokens and one may be too small for its parts, or without end."""
    if not stream.tokens:
        return
    cells, least = stream.cells(), 1 if parts == 1 else parts * SUB_BATCH
    largest, most = int(cells.max()), 2**20 * int(cells.min())
    if stream.tokens < least * largest:
        raise ConfigError(
            f"tokens_per_batch must hold {least} of the largest item's {largest} cells, {least * largest}, "
            f"got {stream.tokens}"
        )
    if stream.tokens > most:
        raise ConfigError(f"tokens_per_batch must be at most {most}, 1048576 items, got {stream.tokens}")


def check_split(batch_size: int, ranks: int, accumulate: int = 1) -> None:
    """Raise ConfigError unless the parts of a batch give the losses of the whole: whole sub-batches of the ratio loss.

    There are ranks·accumulate parts.
    """
    parts = ranks * accumulate
    if parts > 1 and batch_size % (parts * SUB_BATCH):
        names = [f"{ranks} processes"] * (ranks > 1) + [f"{accumulate} accumulated parts"] * (accumulate > 1)
        raise ConfigError(
            f"batch_size {batch_size} over {' of '.join(names)} must be a multiple of {parts * SUB_BATCH}: "
            f"the ratio loss is taken over {SUB_BATCH} samples"
        )


def check_latents(item: dict[str, torch.Tensor], codec: Any) -> None:
    """Raise DataError where an item's image does not become a latent of the noise's shape."""
    latent = item["image"][None]
    if codec is not None:
        latent = codec.encode(latent)
    if latent[0].shape != item["noise"].shape:
        raise DataError(
            f"the data gives latents of shape {tuple(latent[0].shape)}, "
            f"the model takes {tuple(item['noise'].shape)} (model.in_channels, model.input_size)"
        )
