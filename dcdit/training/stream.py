"""Which samples, noises, times and labels each training step sees: a function of (seed, step, position) alone.

Nothing random is saved with a checkpoint, and splitting a batch over processes changes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..data.sources import Source
from ..errors import ConfigError, DataError
from ..interrupts import ignored
from .objectives import DDPM, SUB_BATCH, FlowMatching

# Streams of random numbers; each has a key of its own.
_SAMPLE, _ORDER, _STEP = range(3)


def generator(seed: int, stream: int, step: int = 0, position: int = 0) -> np.random.Generator:
    """Random numbers that depend on these four alone, so that nothing has to be saved to resume (Philox)."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, position, step]))


def draw_drop_fraction(seed: int, step: int, choices: Sequence[float], warmup: int) -> float:
    """ρ of a step, the same on every rank: 0 in the first `warmup` steps, then one of `choices`."""
    if step < warmup:
        return 0.0
    return float(choices[int(generator(seed, _STEP, step).integers(len(choices)))])


class TrainingStream(Dataset):
    """An endless training set: item step·batch_size + position is a sample with its noise, time and label.

    Every item is {"image": (C, H, W), "noise": latent shape, "t": (), "y": ()}, a function of (seed, step, position)
    only. Each epoch is a permutation of the source. With `skip_broken` the next readable picture of the permutation
    stands in the place of an unreadable one, which is named once on stderr.
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
    ) -> None:
        self.source, self.objective, self.latent_shape, self.null_label = source, objective, latent_shape, null_label
        self.seed, self.batch_size, self.label_drop, self.flip = seed, batch_size, label_drop, flip
        self.skip_broken, self.broken = skip_broken, set[int]()
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        epoch, place = divmod(item, len(self.source))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, generator(self.seed, _ORDER, epoch).permutation(len(self.source))
        rng = generator(self.seed, _SAMPLE, *divmod(item, self.batch_size))
        t = self.objective.draw_time(rng)
        drop_label, flip = rng.random(2) < (self.label_drop, 0.5 * self.flip)
        noise = rng.standard_normal(self.latent_shape, dtype=np.float32)
        image, label = self._load(place, bool(flip))
        if not 0 <= label < self.null_label:
            raise DataError(f"class id {label} of item {self.order[place]} is outside [0, {self.null_label})")
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image)),
            "noise": torch.from_numpy(noise),
            "t": torch.tensor(t, dtype=torch.float32),
            "y": torch.tensor(self.null_label if drop_label else label),
        }

    def _load(self, place: int, flip: bool) -> tuple[np.ndarray, int]:
        for shift in range(len(self.source)):
            index = int(self.order[(place + shift) % len(self.source)])
            try:
                return self.source.load(index, flip)
            except DataError as error:
                if not self.skip_broken:
                    raise
                if index not in self.broken:
                    print(f"skipped: {error}", file=sys.stderr)
                self.broken.add(index)
        raise DataError("none of the data's items can be read")


def batches(
    stream: TrainingStream,
    start: int,
    stop: int,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of the steps [start, stop): the `rank`-th of `ranks` equal slices of each global batch.

    With `pin_memory` a copy to a GPU with `non_blocking=True` does not wait for the steps before it.
    """
    share = stream.batch_size // ranks
    firsts = (step * stream.batch_size + rank * share for step in range(start, stop))
    try:
        yield from DataLoader(
            stream,
            batch_sampler=(range(first, first + share) for first in firsts),
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=ignored,
        )
    except DataError as error:
        # A worker process sends its whole traceback; the last line is what it had to say.
        raise DataError(str(error).splitlines()[-1].removeprefix("dcdit.errors.DataError: ")) from error


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
