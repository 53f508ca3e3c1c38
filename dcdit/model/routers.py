"""Routers: the boundary probability of every cell, in float32 (arXiv 2603.06351 section 3).

A router is a module, called as router(h, c) with h (B, L, D) and the conditioning c (B, D), that returns
boundary_prob (B, L). `macs(cells)` is its cost: the multiply-adds of one image of that many cells.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from dcdit_kernels import boundary_cosine, boundary_predictability

from .config import DCDiTConfig
from .guess_router import GuessRouter
from .layers import Conv3x3, WideLinear, WidePointwiseConv2d


class PredictabilityRouter(nn.Module):
    """v2: a cell is a boundary where its neighbourhood does not predict it. It does not look at c."""

    def __init__(self, config: DCDiTConfig) -> None:
        super().__init__()
        self.grid = config.input_size
        self.target_ratio = config.target_ratio
        width = config.hidden_size // 4
        self.proj = WidePointwiseConv2d(config.hidden_size, width)
        self.context = Conv3x3(width, width)
        self.scorer = Conv3x3(width, width)
        self.norm = Affine(width)
        self.score = Score(width)
        self.init_weights()

    def init_weights(self) -> None:
        """The last bias is −log(N − 1): p is about 1/N on average. At first p rarely exceeds 1/2; training changes
        that, until about 1/N of the cells are kept."""
        nn.init.constant_(self.score.bias, -math.log(self.target_ratio - 1))

    def forward(
        self, h: torch.Tensor, c: torch.Tensor | None = None, *, grid: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """h (B, L, D) → boundary_prob (B, L).

        `grid` is the configuration's where None. The frames of a video (F, H, W) are separate planes, a
        sequence (L,) is one row.
        """
        if h.shape[-1] != self.proj.in_channels:
            raise ValueError(f"h must have the router's {self.proj.in_channels} channels, got {h.shape[-1]}")
        height, width = (1, *(grid or self.grid))[-2:]
        z = self.proj(h.reshape(-1, height, width, h.shape[2]).permute(0, 3, 1, 2))
        return self.score(self.scorer(z - self.context(z)), *self.norm()).view(h.shape[:2])

    def macs(self, cells: int) -> float:
        """Multiply-adds of one image."""
        quarter = self.proj.out_channels
        return cells * (self.proj.in_channels * quarter + 2 * 9 * quarter**2 + quarter)


class Affine(nn.Module):
    """Weight and bias (C,) of a GroupNorm. `Score` applies them in its kernel and asks for them by a forward: what
    moves a module's weights to where it computes acts on forwards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight, bias), each (C,)."""
        return self.weight.view(-1), self.bias.view(-1)


class Score(nn.Module):
    """GroupNorm–SiLU–Conv1×1–sigmoid in one kernel: `boundary_predictability`. Its weights are the convolution's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(1, width, 1, 1)), nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Conv2d's."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.uniform_(self.bias, *(side / math.sqrt(self.weight.numel()) for side in (-1, 1)))

    def forward(self, features: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor) -> torch.Tensor:
        """features (B, C, H, W), the GroupNorm's weight and bias (C,) → boundary_prob (B, H·W)."""
        return boundary_predictability(features, norm_weight, norm_bias, self.weight.flatten(), self.bias)


class CosineRouter(nn.Module):
    """v1: a cell is a boundary where its query differs from its neighbours' keys. It does not look at c."""

    def __init__(self, config: DCDiTConfig) -> None:
        super().__init__()
        self.grid = config.input_size
        width = config.hidden_size
        self.query = WideLinear(width, width, bias=False)
        self.key = WideLinear(width, width, bias=False)
        self.kernel = nn.Parameter(torch.empty(width, 3, 3))
        self.init_weights()

    def init_weights(self) -> None:
        """Equal projections at first, so that p measures the dissimilarity of h itself; a uniform neighbourhood."""
        nn.init.eye_(self.query.weight)
        nn.init.eye_(self.key.weight)
        nn.init.constant_(self.kernel, 1 / 9)

    def forward(
        self, h: torch.Tensor, c: torch.Tensor | None = None, *, grid: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """h (B, L, D) → boundary_prob (B, L); `grid` (H, W) is the configuration's where None."""
        return boundary_cosine(self.query(h), self.key(h), self.kernel, grid or self.grid)

    def macs(self, cells: int) -> float:
        """Multiply-adds of one image."""
        width = self.query.in_features
        return cells * (2 * width**2 + 10 * width)


def make_router(config: DCDiTConfig) -> nn.Module:
    """The router that the configuration names."""
    kinds = {"predictability": PredictabilityRouter, "cosine": CosineRouter, "guess": GuessRouter}
    return kinds[config.router](config)
