"""Routers: the boundary probability of every cell, in float32 (arXiv 2603.06351 section 3)."""

from __future__ import annotations

import math

import torch
from torch import nn

from dcdit_kernels import boundary_cosine, boundary_predictability

from .config import DCDiTConfig


class PredictabilityRouter(nn.Module):
    """v2: a cell is a boundary where its neighbourhood does not predict it. h (B, L, D) → p (B, L)."""

    def __init__(self, config: DCDiTConfig) -> None:
        super().__init__()
        self.grid = config.input_size
        width = config.hidden_size // 4
        self.proj = nn.Conv2d(config.hidden_size, width, 1)
        self.context = nn.Conv2d(width, width, 3, padding=1)
        self.scorer = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)
        self.score = nn.Conv2d(width, 1, 1)
        # A fresh router's p is about 1/N on average; above 1/2 it hardly ever is: that many tokens come with training.
        nn.init.constant_(self.score.bias, -math.log(config.target_ratio - 1))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        z = self.proj(h.transpose(1, 2).unflatten(2, self.grid))
        features = self.scorer(z - self.context(z))
        weight = self.score.weight.flatten()
        return boundary_predictability(features, self.norm.weight, self.norm.bias, weight, self.score.bias)


class CosineRouter(nn.Module):
    """v1: a cell is a boundary where its query differs from its neighbours' keys. h (B, L, D) → p (B, L)."""

    def __init__(self, config: DCDiTConfig) -> None:
        super().__init__()
        self.grid = config.input_size
        width = config.hidden_size
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.kernel = nn.Parameter(torch.full((width, 3, 3), 1 / 9))
        # Equal projections at first, so that p measures the dissimilarity of h itself.
        nn.init.eye_(self.query.weight)
        nn.init.eye_(self.key.weight)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return boundary_cosine(self.query(h), self.key(h), self.kernel, self.grid)


def make_router(config: DCDiTConfig) -> nn.Module:
    """The router that the configuration names."""
    return {"predictability": PredictabilityRouter, "cosine": CosineRouter}[config.router](config)
