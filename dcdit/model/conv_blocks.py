"""Encoder and decoder: residual convolution blocks, channels-last from end to end.

`ConvStack` is the paper's, on all cells. `CoarseEncoder` and `CoarseDecoder` work on blocks of stride×stride cells.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from dcdit_kernels import group_norm_silu

from .config import DCDiTConfig
from .layers import BiasApartConv3x3, Conv3x3, PointwiseConv2d, RMSNorm, check_dtype, may_overwrite


class GroupNormSiLU(nn.GroupNorm):
    """GroupNorm, then SiLU, with bias and conditioning added in front of both: one kernel."""

    def forward(
        self, x: torch.Tensor, x_bias: torch.Tensor | None = None, cond: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x (B, C, H, W), x_bias (C,), cond (B, C) → (B, C, H, W), channels-last."""
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, cond, x_bias, self.eps)


class ResidualConvBlock(nn.Module):
    """GroupNorm–SiLU–Conv3×3, + Linear(c), GroupNorm–SiLU–Conv3×3, + skip (arXiv 2603.06351)."""

    def __init__(self, width_in: int, width_out: int, width_cond: int, groups: int = 32) -> None:
        super().__init__()
        inner = min(width_in, width_out)
        self.norm1 = GroupNormSiLU(groups, width_in)
        self.conv1 = BiasApartConv3x3(width_in, inner)
        self.cond = nn.Sequential(nn.SiLU(), nn.Linear(width_cond, inner))
        self.norm2 = GroupNormSiLU(groups, inner)
        apart = width_in != width_out
        self.conv2 = BiasApartConv3x3(inner, width_out) if apart else Conv3x3(inner, width_out)
        self.skip = PointwiseConv2d(width_in, width_out) if apart else nn.Identity()

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x (B, in, H, W) channels-last, c (B, D) → (B, out, H, W) channels-last.

        c comes through the SiLU of `cond` already, which `DCDiT.condition` computes once for all blocks.
        """
        h = self.norm2(*self.conv1(self.norm1(x)), self.cond[1](c))
        if isinstance(self.conv2, BiasApartConv3x3):  # the product of the skip adds both biases
            out, bias = self.conv2(h)
            skip = self.skip(x, bias)
        else:
            out, skip = self.conv2(h), self.skip(x)
        return out.add_(skip) if may_overwrite(out, self.conv2) else out + skip


class ConvStack(nn.Module):
    """Encoder or decoder: residual conv blocks through `widths`, then RMSNorm of the last."""

    def __init__(self, widths: tuple[int, ...], width_cond: int, groups: int = 32) -> None:
        super().__init__()
        pairs = itertools.pairwise(widths)
        self.blocks = nn.ModuleList(ResidualConvBlock(a, b, width_cond, groups) for a, b in pairs)
        self.norm = RMSNorm(widths[-1], eps=1e-5)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W), c (B, D) through SiLU → (B, H·W, width)."""
        x = x.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x, c)
        return self.norm(x.flatten(2).transpose(1, 2))


class Stem(Conv3x3):
    """The first convolution; with a stride on blocks of stride×stride cells as input channels."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__(channels * stride**2, width)
        self.unshuffle = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W) → (B, width, H/stride, W/stride). Raises ValueError for another dtype than the model's."""
        check_dtype(x, self.weight)
        return super().forward(x if self.unshuffle == 1 else F.pixel_unshuffle(x, self.unshuffle))


class CoarseEncoder(nn.Module):
    """Two conv blocks on the coarse grid, then a linear map to the features of each cell of a block, and RMSNorm."""

    def __init__(self, narrow: int, width: int, stride: int, groups: int = 32) -> None:
        super().__init__()
        self.stride = stride
        self.blocks = nn.ModuleList(ResidualConvBlock(narrow, narrow, width, groups) for _ in range(2))
        self.spread = nn.Linear(narrow, stride**2 * width)
        self.norm = RMSNorm(width, eps=1e-5)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x (B, e, H/stride, W/stride), c (B, D) through SiLU → h (B, H·W, D), cells in raster order."""
        x = x.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x, c)
        cells = self.spread(x.movedim(1, -1)).unflatten(3, (self.stride, self.stride, -1))
        return self.norm(cells.transpose(2, 3).flatten(1, 4))


class CoarseDecoder(nn.Module):
    """A linear map of the features of each block of cells, two conv blocks on the coarse grid, and RMSNorm."""

    def __init__(self, width: int, narrow: int, stride: int, groups: int = 32) -> None:
        super().__init__()
        self.stride = stride
        self.gather = nn.Linear(stride**2 * width, narrow)
        self.blocks = nn.ModuleList(ResidualConvBlock(narrow, narrow, width, groups) for _ in range(2))
        self.norm = RMSNorm(narrow, eps=1e-5)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x (B, D, H, W), c (B, D) through SiLU → (B, blocks of cells, e)."""
        height, width = (side // self.stride for side in x.shape[2:])
        cells = x.movedim(1, -1).unflatten(2, (width, self.stride)).unflatten(1, (height, self.stride))
        x = self.gather(cells.transpose(2, 3).flatten(3)).movedim(-1, 1)
        for block in self.blocks:
            x = block(x, c)
        return self.norm(x.flatten(2).transpose(1, 2))


def make_encoder(config: DCDiTConfig) -> nn.Module:
    """(B, e, H/stride, W/stride), (B, D) → h (B, H·W, D)."""
    narrow, width = config.encoder_width, config.hidden_size
    if config.encoder_stride == 1:
        return ConvStack((narrow, narrow, width), width, config.norm_groups)
    return CoarseEncoder(narrow, width, config.encoder_stride, config.norm_groups)


def make_decoder(config: DCDiTConfig) -> nn.Module:
    """(B, D, H, W), (B, D) → (B, blocks of cells, e)."""
    narrow, width = config.encoder_width, config.hidden_size
    if config.encoder_stride == 1:
        return ConvStack((width, narrow, narrow), width, config.norm_groups)
    return CoarseDecoder(width, narrow, config.encoder_stride, config.norm_groups)
