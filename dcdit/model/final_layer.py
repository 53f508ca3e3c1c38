"""The output layer of a DC-DiT."""

from __future__ import annotations

import torch
from torch import nn

from dcdit_kernels import adaln_modulate


class FinalLayer(nn.Module):
    """adaLN, then a linear map to the prediction (DiT, arXiv 2212.09748 section 3.2)."""

    def __init__(self, width: int, width_cond: int, channels: int) -> None:
        super().__init__()
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(width_cond, 2 * width))
        self.linear = nn.Linear(width, channels)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x (B, L, width), c (B, width_cond) through the SiLU of `adaln` already → (B, L, channels)."""
        shift, scale = self.adaln[1](c).chunk(2, dim=1)
        return self.linear(adaln_modulate(x, shift, scale))
