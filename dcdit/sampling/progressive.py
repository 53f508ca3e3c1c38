"""Trajectories that begin on a coarse grid, for models that take any grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError
from .schedulers import TRAIN_STEPS


@dataclass(frozen=True)
class CoarseStart:
    """The first `steps` forwards are on a grid of `size` (h, w), the others on `full` (H, W).

    A coarse picture averages noise away. With r = √(HW/hw) it has the noise of σ' on the full grid at
    σ = σ' / (r − (r − 1)·σ'), by which its time is shifted (arXiv 2403.03206 eq. 23, the other way). `sigmas`
    (steps + 1,) are these σ; at the last the picture is expanded to time σ' = `sigma`.
    """

    size: tuple[int, int]
    full: tuple[int, int]
    steps: int
    sigmas: tuple[float, ...]
    sigma: float

    @classmethod
    def plan(cls, share: float, above: float, full: tuple[int, int], stride: int, scheduler: Any) -> CoarseStart | None:
        """Sides of `share` where t > `above`, rounded to multiples of `stride`; the last step is on the full grid.

        `scheduler` is a flow-euler one, set to its steps. None where no step is so early. Raises ConfigError.
        """
        if type(scheduler).__name__ != "FlowMatchEulerDiscreteScheduler":
            raise ConfigError(f"grid is of the scheduler flow-euler, got {type(scheduler).__name__}")
        size = max(1, round(full[0] * share / stride)) * stride, max(1, round(full[1] * share / stride)) * stride
        steps = min(int((scheduler.timesteps > above).sum()), len(scheduler.timesteps) - 1)
        if not steps or size == full:
            return None
        ratio = math.sqrt(full[0] * full[1] / (size[0] * size[1]))
        way = scheduler.sigmas[: steps + 1].tolist()
        return cls(size, full, steps, tuple(s / (ratio - (ratio - 1) * s) for s in way), way[-1])

    @property
    def timesteps(self) -> torch.Tensor:
        """The model's timesteps on the coarse grid, (steps,)."""
        return TRAIN_STEPS * torch.tensor(self.sigmas[:-1])

    def scheduler(self) -> Any:
        """The scheduler of the coarse steps; its last time is the expansion's."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=list(self.sigmas))
        return scheduler

    def expand(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The coarse x (B, C, h, w) and fresh normal noise (B, C, H, W) → x on the full grid at time `sigma`.

        x's cosine transform becomes the low frequencies, scaled to the full grid's signal and noise. The high ones have
        noise alone.
        """
        scale = math.sqrt(noise[0, 0].numel() / x[0, 0].numel()) * (1 - self.sigma) / (1 - self.sigmas[-1])
        (rows, columns), (tall, wide) = ((cosines(side).to(x) for side in size) for size in (self.size, self.full))
        spectrum = self.sigma * (tall @ noise @ wide.T)
        spectrum[..., : self.size[0], : self.size[1]] = scale * (rows @ x @ columns.T)
        return tall.T @ spectrum @ wide


def cosines(side: int) -> torch.Tensor:
    """The orthonormal cosine transform (DCT-II) of `side` numbers as a matrix, float64: frequencies by places."""
    place, frequency = torch.arange(side, dtype=torch.float64), torch.arange(side, dtype=torch.float64)[:, None]
    matrix = torch.cos(math.pi / side * (place + 0.5) * frequency) * math.sqrt(2 / side)
    matrix[0] /= math.sqrt(2)
    return matrix
