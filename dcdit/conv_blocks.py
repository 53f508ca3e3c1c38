"""Encoder and decoder: residual convolution blocks on the whole grid, channels-last from end to end."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from dcdit_kernels import group_norm_silu

from .layers import Conv3x3, PointwiseConv2d, RMSNorm

GROUPS = 32


class GroupNormSiLU(nn.GroupNorm):
    """GroupNorm, then SiLU, with the conditioning added in front of both: one kernel."""

    def forward(self, x: torch.Tensor, cond: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, C, H, W), cond (B, C) → (B, C, H, W), channels-last."""
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, cond, self.eps)


class ResidualConvBlock(nn.Module):
    """GroupNorm–SiLU–Conv3×3, + Linear(c), GroupNorm–SiLU–Conv3×3, + skip (arXiv 2603.06351)."""

    def __init__(self, width_in: int, width_out: int, width_cond: int) -> None:
        super().__init__()
        inner = min(width_in, width_out)
        self.norm1 = GroupNormSiLU(GROUPS, width_in)
        self.conv1 = Conv3x3(width_in, inner)
        self.cond = nn.Sequential(nn.SiLU(), nn.Linear(width_cond, inner))
        self.norm2 = GroupNormSiLU(GROUPS, inner)
        self.conv2 = Conv3x3(inner, width_out)
        self.skip = PointwiseConv2d(width_in, width_out) if width_in != width_out else nn.Identity()

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x (B, in, H, W) channels-last, c (B, D) → (B, out, H, W) channels-last.

        c comes through the SiLU of `cond` already, which `ConvStack` computes once for all blocks.
        """
        h = self.norm2(self.conv1(self.norm1(x)), self.cond[1](c))
        return self.conv2(h).add_(self.skip(x))


class ConvStack(nn.Module):
    """Encoder or decoder: residual conv blocks through `widths`, then RMSNorm of the last."""

    def __init__(self, widths: tuple[int, ...], width_cond: int) -> None:
        super().__init__()
        pairs = itertools.pairwise(widths)
        self.blocks = nn.ModuleList(ResidualConvBlock(a, b, width_cond) for a, b in pairs)
        self.norm = RMSNorm(widths[-1], eps=1e-5)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W), c (B, D) → (B, H·W, width)."""
        x, active = x.contiguous(memory_format=torch.channels_last), F.silu(c)
        for block in self.blocks:
            x = block(x, active)
        return self.norm(x.flatten(2).transpose(1, 2))
