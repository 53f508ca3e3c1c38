"""ρ, the share of the boundaries to drop, over the steps and images of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import ConfigError

DropFraction = float | torch.Tensor | Sequence[float] | Callable[[float], float]


def drop_table(drop: DropFraction, timesteps: torch.Tensor, count: int) -> torch.Tensor:
    """ρ of every step and image (S, N), float32, for `timesteps` (S,) from 1000 (noise) to 0 (data) and N = `count`.

    `drop` is a number; a tensor (N,), one for each image; a list of at most S numbers, each for an equal share of the
    steps (S of them: one for each step); or a function of the timestep. Raises ConfigError.
    """
    table = over_steps(drop, timesteps, count, "drop fractions")
    wrong = table[~((table >= 0) & (table < 1))]
    if len(wrong):
        raise ConfigError(f"drop fractions must be in [0, 1), got {wrong[0]:g}")
    return table


def over_steps(given: Any, timesteps: torch.Tensor, count: int, name: str) -> torch.Tensor:
    """Numbers for every step and image (S, N), float32, given as `drop_table` describes. Raises ConfigError."""
    steps = len(timesteps)
    if isinstance(given, torch.Tensor) and given.dim() == 1:
        if len(given) != count:
            raise ConfigError(f"{name}: one for each image needs {count} values, got {len(given)}")
        return given.float().cpu().expand(steps, count)
    if callable(given):
        given = [given(t) for t in timesteps.tolist()]
    try:
        values = torch.as_tensor(given, dtype=torch.float32).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{name} must be numbers, got {given!r}") from error
    if values.dim() > 1 or not 1 <= values.numel() <= steps:
        shape = tuple(values.shape)
        raise ConfigError(f"{name} over {steps} steps must be 1 to {steps} numbers, got shape {shape}")
    share = torch.arange(steps) * values.numel() // steps
    return values.reshape(-1, 1)[share].expand(steps, count)
