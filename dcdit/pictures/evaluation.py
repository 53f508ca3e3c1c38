"""How far a set of pictures is from a reference, in the features of any network.

Fréchet distance (arXiv 1706.08500 eq. 6) and kernel distance (arXiv 1801.01401) by torchmetrics; precision and recall
(arXiv 1904.06991), density and coverage (arXiv 2002.09797) here.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn

from ..errors import DataError
from .conv_classifier import to_tensor

MOST = 10_000  # features kept of each set, for comparisons in pairs
NEIGHBOURS = 5


class Features:
    """Of a set: sums for the Fréchet distance, and the first MOST features."""

    def __init__(self, network: nn.Module, batches: Iterable[np.ndarray]) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.first, self.count = torch.empty(0), 0
        self.moments: FrechetInceptionDistance | None = None
        for batch in batches:
            rows = features_of(network, batch)
            if self.moments is None:
                given = nn.Identity()
                given.num_features = rows.shape[1]
                self.moments, self.first = FrechetInceptionDistance(given), rows[:0]
            self.moments.update(rows, real=True)
            self.first = torch.cat([self.first, rows[: MOST - len(self.first)]])
            self.count += len(rows)
        if self.moments is None or self.count < 2:
            raise DataError(f"expected at least two pictures, found {self.count}")


def features_of(network: nn.Module, batch: np.ndarray) -> torch.Tensor:
    """float32 (N, F) of uint8 pictures (N, H, W, 3), or as many rows of each picture, as of patches. Raises DataError
    for a network that gives anything else."""
    try:
        with torch.no_grad():
            rows = network(to_tensor(batch))
    except RuntimeError as error:  # of a TorchScript network the last line is the message
        reason = str(error).strip().splitlines()[-1]
        raise DataError(
            f"the network cannot take pictures of {batch.shape[1]}×{batch.shape[2]} pixels: {reason}"
        ) from error
    if not isinstance(rows, torch.Tensor) or rows.dim() != 2 or not len(rows) or len(rows) % len(batch):
        came = tuple(rows.shape) if isinstance(rows, torch.Tensor) else type(rows).__name__
        raise DataError(f"the network must give features (N, F) of N = {len(batch)} pictures, it gave {came}")
    if not rows.isfinite().all():
        raise DataError("the network must give finite features, it gave NaN or infinity")
    return rows.float()


def compare(samples: Features, reference: Features) -> dict[str, float]:
    """Name → number; see the module."""
    from torchmetrics.image.kid import KernelInceptionDistance

    near, real = samples.first, reference.first
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the metric's, about memory for features
        kernel = KernelInceptionDistance(nn.Identity(), subset_size=min(1000, len(near), len(real)))
    kernel.update(near, real=False)
    kernel.update(real, real=True)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # of its subsets; a GPU's generator goes on
        kid = kernel.compute()[0].item()
    return {"frechet": frechet(samples, reference), "kernel": kid, **manifold(near, real)}


def frechet(samples: Features, reference: Features) -> float:
    """The Fréchet distance alone."""
    distance, other = copy.deepcopy(reference.moments), samples.moments  # the metric keeps its first answer
    for name in ("features_sum", "features_cov_sum", "features_num_samples"):
        setattr(distance, f"fake_{name}", getattr(other, f"real_{name}"))
    return distance.compute().item()


def manifold(samples: torch.Tensor, real: torch.Tensor, neighbours: int = NEIGHBOURS) -> dict[str, float]:
    """Precision, recall, density and coverage of samples (N, F) against real (M, F), by balls around each feature that
    reach to its k-th neighbour in its own set."""
    if min(len(samples), len(real)) <= neighbours:
        raise DataError(f"precision and recall need more than {neighbours} pictures on each side")
    of_real, of_samples = _radii(real, neighbours), _radii(samples, neighbours)
    covered = torch.zeros(len(real), dtype=torch.bool)
    inside, found = torch.empty(len(samples)), torch.zeros(len(real), dtype=torch.bool)
    for start in range(0, len(samples), 1000):
        rows = slice(start, start + 1000)
        distances = torch.cdist(samples[rows], real)
        balls = distances <= of_real
        inside[rows] = balls.sum(1).float()
        covered |= balls.any(0)
        found |= (distances <= of_samples[rows, None]).any(0)
    return {
        "precision": (inside > 0).float().mean().item(),
        "recall": found.float().mean().item(),
        "density": inside.mean().item() / neighbours,
        "coverage": covered.float().mean().item(),
    }


def _radii(rows: torch.Tensor, neighbours: int) -> torch.Tensor:
    parts = rows.split(1000)
    return torch.cat([torch.cdist(part, rows).kthvalue(neighbours + 1, dim=1).values for part in parts])


def agreement(
    classify: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[np.ndarray], labels: np.ndarray
) -> float:
    """Share of pictures that are taken for the class of their label; classify: uint8 (n, 3, H, W) → classes (n,)."""
    with torch.no_grad():
        seen = torch.cat([classify(to_tensor(batch)) for batch in batches]).numpy()
    return float((seen == labels).mean())
