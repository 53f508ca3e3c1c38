"""Routing by the model's own guess of the clean picture: the cells with most contrast in it are kept (docs/quality.md).

A learned router looks at features of the noisy picture, and above some noise it finds no detail. The guess has less
noise at every time. As in self-conditioning (arXiv 2208.04202) it comes from the step before where there is one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .config import DCDiTConfig
from .routing import regular_cells


class GuessRouter(nn.Module):
    """The L/N cells that differ most from their neighbours in a guess; without one, every √N-th cell of every √N-th
    row, as many. It has no parameters, and reads neither h nor c."""

    def __init__(self, config: DCDiTConfig) -> None:
        super().__init__()
        self.grid, self.keep_grid = config.input_size, config.keep_grid
        self.stride = math.isqrt(int(config.target_ratio))

    def init_weights(self) -> None:
        """There are none."""

    def forward(
        self,
        h: torch.Tensor,
        c: torch.Tensor | None = None,
        *,
        guess: torch.Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """h (B, L, D), guess (B, C, H, W) of the clean latents → boundary_prob (B, L), float32 at least.

        Kept cells have 1 down to 0.99, the others 0.01 down to 0, in the order of their contrast: a tail drop leaves
        the flattest out, and a token of either kind is as good as certain. `grid` is the configuration's where None.
        All cells of a sample have NaN where its guess is not finite.
        """
        grid = grid or self.grid
        dtype = torch.promote_types(h.dtype, torch.float32)
        if guess is None:
            return regular_cells(grid, self.stride, h.device).to(dtype).expand(h.shape[:2])
        score = contrast(guess.to(dtype)).flatten(1)
        broken = 0 * score.sum(1, keepdim=True)  # NaN where a guess is not finite, for the plan to refuse
        if self.keep_grid:
            score = score.masked_fill(regular_cells(grid, self.keep_grid, h.device), math.inf)
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # 0 for the highest
        place = rank.to(dtype) / score.shape[1]
        return torch.where(rank < self.count(grid), 1 - place / 100, (1 - place) / 100) + broken

    def count(self, grid: tuple[int, ...]) -> int:
        """The cells that are kept of a grid (H, W)."""
        return math.prod(-(-side // self.stride) for side in grid)

    def macs(self, cells: int) -> float:
        """Multiply-adds of one image: none. A guess without a step before costs a pass of backbone and decoder."""
        return 0.0


def contrast(picture: torch.Tensor) -> torch.Tensor:
    """picture (B, C, H, W) → (B, H, W): of each cell the absolute differences to its four neighbours, summed."""
    total = torch.zeros_like(picture[:, 0])
    for axis in (1, 2):
        step = picture.diff(dim=axis + 1).abs().sum(1)
        total.narrow(axis, 0, step.shape[axis]).add_(step)
        total.narrow(axis, 1, step.shape[axis]).add_(step)
    return total


def takes_guess(model: Any) -> bool:
    """Whether a model routes by a guess; a model without a router does not."""
    return getattr(model, "takes_guess", False)
