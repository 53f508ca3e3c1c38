"""Tokens of each step of a trajectory: as they are asked for, or as many as FLOPs or seconds per image pay for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import ConfigError
from ..model.config import DCDiTConfig
from ..model.flops import dcdit_flops
from ..model.routing import least_tokens
from .drop_fraction import over_steps

Tokens = int | torch.Tensor | Sequence[int] | Callable[[float], int]
# The share of the mean that a step gets, noise first; "router" is the checkpoint's own.
SCHEDULES: dict[str, tuple[float, float]] = {"constant": (1.0, 1.0), "linear": (2 / 3, 4 / 3)}


def token_table(tokens: Tokens, timesteps: torch.Tensor, count: int, config: DCDiTConfig) -> torch.Tensor:
    """Tokens of every step and image (S, N), int64; `tokens` as ρ in `drop_table`. Raises ConfigError."""
    table = over_steps(tokens, timesteps, count, "tokens")
    least, cells = least_tokens(config.input_size, config.keep_grid), config.cells
    wrong = table[(table != table.round()) | ~((table >= least) & (table <= cells))]
    if len(wrong):
        raise ConfigError(f"tokens of a step must be whole numbers from {least} to {cells}, got {wrong[0]:g}")
    return table.long()


def tokens_for_gflops(config: DCDiTConfig, gflops: float, halves: Sequence[int],
                      schedule: str | torch.Tensor = "constant", router: Any = None) -> list[int]:  # fmt: skip
    """Tokens of each forward of a trajectory, for at most `gflops` GFLOP per image and less than a token short of it.

    `halves` has the halves that run in each forward, noise first: 2 with guidance, else 1. Both halves get the same
    number. Steps differ as the schedule says, and by one token more where that comes closest. `router` as in
    `dcdit_flops`. Raises ConfigError where no number of tokens costs so much or so little.
    """
    gflop = [dcdit_flops(config, n, router)["total"] for n in range(config.cells + 1)]
    prices = torch.tensor(gflop, dtype=torch.float64)
    return tokens_for(config, gflops, "GFLOP", {1: prices, 2: 2 * prices}, halves, schedule)


def tokens_for(
    config: DCDiTConfig,
    total: float,
    unit: str,
    costs: dict[int, torch.Tensor],
    halves: Sequence[int],
    schedule: str | torch.Tensor = "constant",
) -> list[int]:
    """As `tokens_for_gflops`, for a `total` in any unit. `costs` of one half and of two (cells + 1,), float64, are an
    image's share of a forward with so many tokens. A schedule may be the relative tokens of the steps (S,)."""
    least, steps = least_tokens(config.input_size, config.keep_grid), len(halves)
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ConfigError(f"a budget's schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        schedule = torch.linspace(*SCHEDULES[schedule], steps, dtype=torch.float64)
    late = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps  # of equal steps the later get a token first
    most = total * (1 + 1e-9)  # sums are rounded
    prices = torch.stack([costs[half] for half in halves])

    def at(mean: float) -> tuple[torch.Tensor, float]:
        tokens = (mean * schedule + late).floor().clamp(least, config.cells).long()
        return tokens, float(prices.gather(1, tokens[:, None]).sum())

    low, high = 0.0, 2.0 * config.cells / min(1.0, float(schedule.min()))
    bounds = at(low)[1], at(high)[1]
    if not bounds[0] <= most or not total <= bounds[1] * (1 + 1e-9):
        kind = f"{steps} forwards of {least} to {config.cells} tokens cost {bounds[0]:.4g} to {bounds[1]:.4g}"
        raise ConfigError(f"no budget of tokens costs {total:g} {unit} per image: {kind}")
    if most >= bounds[1]:
        return at(high)[0].tolist()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[1] <= most else (low, middle)
    return at(low)[0].tolist()
