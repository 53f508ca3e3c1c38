"""Additions to the inputs: the embedding of the time, and the table of positions."""

from __future__ import annotations

import math

import torch
from torch import nn

from dcdit_kernels._check import traced

from .aside import capturing
from .layers import CastLinear


class TimestepEmbedding(nn.Module):
    """Sinusoid of t (scale 0 to 1000), 256 numbers → MLP → D (DiT, arXiv 2212.09748)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(CastLinear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """t (B,) → (B, D). The sinusoid is computed in float32."""
        angle = t.float()[:, None] * frequencies(t)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


_kept: dict[torch.device, torch.Tensor] = {}


def frequencies(like: torch.Tensor) -> torch.Tensor:
    """10000^(-k/128), float32 (128,), on the device of `like`.

    Kept for each device: four launches less in each forward. They are no buffer of a module, which `to_empty` and
    loading by assignment would have to know. What is traced computes its own, and so does a CUDA graph that is captured
    before any other call.
    """
    found = None if traced(like) else _kept.get(like.device)
    if found is not None:
        return found
    if traced(like) or torch._C._are_functorch_transforms_active() or capturing(like):
        return _frequencies(like.device)
    with torch.inference_mode(False):  # a copy from a CPU waits, so that every stream may read it
        made = _frequencies(torch.device("cpu")).to(like.device)
    if type(made) is torch.Tensor:  # not a mode's stand-in
        _kept[like.device] = made
    return made


def _frequencies(device: torch.device) -> torch.Tensor:
    exponent = torch.arange(128, device=device, dtype=torch.float32) * (-math.log(10000) / 128)
    # Rounded once: a float32 exp's last bit differs between machines, and t = 1000 multiplies it.
    wide = exponent.to(torch.float32 if device.type == "mps" else torch.float64)
    return torch.exp(wide, out=torch.empty_like(exponent))


def sincos_2d(
    width: int, grid: tuple[int, ...], patch: float | torch.Tensor = 1, device: torch.device | None = None
) -> torch.Tensor:
    """2D sin-cos position table (H·W, width): the column's code in the first half, the row's in the second.

    With `patch` a cell's position is counted in patches of patch×patch cells, from the middle of the first patch.
    """
    device = device or torch.get_default_device()
    if device.type == "meta":  # whose arithmetic is in Python, behind PyTorch's compiler
        return torch.empty(math.prod(grid), width // 4 * 4, device=device)
    exact = torch.float32 if device.type == "mps" else torch.float64
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=exact, device=device) / (width // 4))
    codes = []
    for side in grid:
        angle = ((torch.arange(side, dtype=exact, device=device) - (patch - 1) / 2) / patch)[:, None] * frequency
        codes.append(torch.cat([angle.sin(), angle.cos()], dim=1).float())
    rows, columns = codes
    shape = (*grid, -1)
    return torch.cat([columns[None].expand(shape), rows[:, None].expand(shape)], dim=2).flatten(0, 1)


def positions_of(table: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    """The table (H·W, D) of another grid in the unit of `table` (L, D), one that `sincos_2d` made.

    The first cell lies −(patch − 1)/(2·patch) from the origin, by which the patch is known without a wait for a GPU.
    """
    width = table.shape[1]
    first = torch.atan2(table[0, 0].double(), table[0, width // 4].double())
    return sincos_2d(width, grid, (1 / (1 + 2 * first)).round(), table.device).to(table.dtype)
