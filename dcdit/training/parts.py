"""A global batch in parts, for processes and accumulation: whole sub-batches of the ratio loss, and their weights."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from ..model.mixed import Samples
from .objectives import SUB_BATCH


def sub_batches(count: int) -> int:
    """Sub-batches of the ratio loss in `count` samples."""
    return -(-count // SUB_BATCH)


def cuts(count: int, parts: int) -> list[int]:
    """Where `parts` parts of `count` samples begin and end (parts + 1,)."""
    return [min(count, SUB_BATCH * (sub_batches(count) * part // parts)) for part in range(parts + 1)]


def in_parts(batch: dict[str, Any], count: int) -> list[tuple[Samples, Samples, torch.Tensor, torch.Tensor]]:
    """Images, noises, times and labels of each of `count` parts of a process's share."""
    ends = list(itertools.pairwise(cuts(len(batch["t"]), count)))
    return [tuple(batch[key][a:b] for key in ("image", "noise", "t", "y")) for a, b in ends]  # type: ignore[misc]


def weights_of(count: int, whole: int, parts: int) -> dict[str, tuple[float, float]]:
    """`weights` of `Trainer.losses` for one of `parts` parts, with `count` of the batch's `whole` samples, so that the
    mean over the parts is that over the samples and over the sub-batches; nothing where all parts are equal."""
    if count * parts == whole:
        return {}
    return {"weights": (count * parts / whole, sub_batches(count) * parts / sub_batches(whole))}


def moved(given: Samples, device: torch.device) -> Samples:
    """A batch, or each sample of a list, on `device`."""
    if isinstance(given, list):
        return [sample.to(device, non_blocking=True) for sample in given]
    return given.to(device, non_blocking=True)
