"""What is added to the inputs: the embedding of the time, and the table of positions."""

from __future__ import annotations

import math

import torch
from torch import nn

from .layers import CastLinear


class TimestepEmbedding(nn.Module):
    """Sinusoid of t (scale 0 to 1000), 256 numbers → MLP → D (DiT, arXiv 2212.09748)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(CastLinear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """t (B,) → (B, D). The sinusoid is computed in float32."""
        exponent = -math.log(10000) * torch.arange(128, device=t.device, dtype=torch.float32) / 128
        # Rounded once: a float32 exp's last bit differs between machines, and t = 1000 multiplies it.
        frequency = exponent.to(torch.float32 if t.device.type == "mps" else torch.float64).exp().float()
        angle = t.float()[:, None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


def sincos_2d(width: int, grid: tuple[int, int], patch: int = 1) -> torch.Tensor:
    """2D sin-cos position table (H·W, width): the column's code in the first half, the row's in the second.

    With `patch` a cell's position is counted in patches of patch×patch cells, from the middle of the first patch.
    """
    positions = [(torch.arange(n, dtype=torch.float64) - (patch - 1) / 2) / patch for n in grid]
    rows, columns = torch.meshgrid(*positions, indexing="ij")
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [axis.reshape(-1, 1) * frequency for axis in (columns, rows)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()
