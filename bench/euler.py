"""Sampling where diffusers is not installed: its Euler method for flow matching, in `dcdit.sampling`'s place for it."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from dcdit.sampling import trajectory


class Euler:
    """As diffusers' FlowMatchEulerDiscreteScheduler with `steps` equal steps from σ = 1 to 0."""

    def __init__(self, steps: int) -> None:
        self.sigmas = torch.from_numpy(np.append(np.linspace(1, 1 / steps, steps), 0.0)).float()
        self.timesteps, self.config = 1000 * self.sigmas[:-1], dict[str, Any]()

    def step(self, out: torch.Tensor, t: torch.Tensor, x: torch.Tensor, **_: Any) -> SimpleNamespace:
        """The velocity `out` and x (B, C, H, W) at the timestep t → x at the next as `prev_sample`."""
        number = int((self.timesteps == t).nonzero())
        return SimpleNamespace(prev_sample=x + (self.sigmas[number + 1] - self.sigmas[number]) * out)


def make_euler(name: str, objective: str, steps: int, *_: Any) -> tuple[Euler, torch.Tensor]:
    """`make_scheduler` of flow matching by Euler's method alone."""
    scheduler = Euler(steps)
    return scheduler, scheduler.timesteps


def stand_in() -> None:
    """Let `sample` use `make_euler` from now on, if diffusers is missing."""
    if importlib.util.find_spec("diffusers") is None:
        trajectory.make_scheduler = make_euler
