"""The layers around and inside the backbone: embedders, residual conv blocks, DiT blocks on packed tokens."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from dcdit_kernels import ChunkPlan, adaln_modulate, gate_residual, gate_residual_modulate, varlen_attention


def sincos_2d(width: int, grid: tuple[int, int], patch: int = 1) -> torch.Tensor:
    """2D sin-cos position table (H·W, width): the column's code in the first half, the row's in the second.

    With `patch` a cell's place is given in units of patch×patch cells, 0 at the middle of the first patch.
    """
    places = [(torch.arange(n, dtype=torch.float64) - (patch - 1) / 2) / patch for n in grid]
    rows, columns = torch.meshgrid(*places, indexing="ij")
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [axis.reshape(-1, 1) * frequency for axis in (columns, rows)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU, tanh form (arXiv 1606.08415). Takes x over: where no gradient needs it, the result stands in its place."""
    return F.gelu(x, approximate="tanh") if x.requires_grad else torch.ops.aten.gelu_(x, approximate="tanh")


def silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU. Takes x over, as `gelu_tanh` does."""
    return F.silu(x, inplace=not x.requires_grad)


class TimestepEmbedding(nn.Module):
    """Sinusoid of t (scale 0 to 1000), 256 numbers → MLP → D (DiT, arXiv 2212.09748)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        frequency = torch.exp(-math.log(10000) * torch.arange(128, device=t.device, dtype=torch.float32) / 128)
        angle = t.float()[:, None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(self.mlp[0].weight.dtype))


class RMSNorm(nn.RMSNorm):
    """In its input's dtype: under autocast the weight is wider, and PyTorch's fused kernel takes one dtype only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class ResidualConvBlock(nn.Module):
    """GroupNorm–SiLU–Conv3×3, + Linear(SiLU(c)), GroupNorm–SiLU–Conv3×3, + skip. (B, in, H, W) → (B, out, H, W)."""

    def __init__(self, width_in: int, width_out: int, width_cond: int) -> None:
        super().__init__()
        inner = min(width_in, width_out)
        self.norm1 = nn.GroupNorm(32, width_in)
        self.conv1 = nn.Conv2d(width_in, inner, 3, padding=1)
        self.cond = nn.Sequential(nn.SiLU(), nn.Linear(width_cond, inner))
        self.norm2 = nn.GroupNorm(32, inner)
        self.conv2 = nn.Conv2d(inner, width_out, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        h = self.conv1(silu(self.norm1(x))).add_(self.cond(c)[:, :, None, None])
        return self.conv2(silu(self.norm2(h))).add_(self.skip(x))


class ConvStack(nn.Module):
    """Encoder or decoder: residual conv blocks through `widths`, then RMSNorm of the last. Returns (B, L, width)."""

    def __init__(self, widths: tuple[int, ...], width_cond: int) -> None:
        super().__init__()
        pairs = itertools.pairwise(widths)
        self.blocks = nn.ModuleList(ResidualConvBlock(a, b, width_cond) for a, b in pairs)
        self.norm = RMSNorm(widths[-1], eps=1e-5)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        # One layout throughout: on a CPU that of tokens, which suits convolutions; on a GPU GroupNorm would undo it.
        last = torch.channels_last if x.device.type == "cpu" else torch.contiguous_format
        x = x.contiguous(memory_format=last)
        for block in self.blocks:
            x = block(x, c)
        return self.norm(x.flatten(2).transpose(1, 2))


class DiTBlock(nn.Module):
    """The two halves of an adaLN-Zero block on packed tokens; `MainNetwork` fuses what stands between them."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        hidden = int(width * mlp_ratio)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def attend(self, x: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, x.shape[1] // self.heads)).unbind(1)
        lengths = (plan.cu_seqlens, plan.cu_seqlens, plan.max_seqlen, plan.max_seqlen)
        out = varlen_attention(q, k, v, *lengths, exact=plan.exact)
        return self.proj(out.reshape(x.shape))

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(gelu_tanh(self.fc1(x)))


class MainNetwork(nn.Module):
    """DiT blocks, then RMSNorm, on packed tokens (T, D). Each gated residual is fused with the next modulation.

    Where `record` is a list, a forward appends the output of each block to it.
    """

    record: list[torch.Tensor] | None = None

    def __init__(self, width: int, depth: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DiTBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = RMSNorm(width, eps=1e-5)

    def forward(self, x: torch.Tensor, c: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
        # Per block: shift, scale, gate of attention, then of the MLP. Each adaln begins with the same SiLU.
        active = F.silu(c)
        modulators = [block.adaln[1](active).chunk(6, dim=1) for block in self.blocks]
        normed = adaln_modulate(x, modulators[0][0], modulators[0][1], plan)
        for i, block in enumerate(self.blocks):
            _, _, gate1, shift2, scale2, gate2 = modulators[i]
            x, normed = gate_residual_modulate(x, block.attend(normed, plan), gate1, shift2, scale2, plan)
            y = block.mlp(normed)
            if i + 1 < len(self.blocks):
                shift1, scale1 = modulators[i + 1][:2]
                x, normed = gate_residual_modulate(x, y, gate2, shift1, scale1, plan)
            else:
                x = gate_residual(x, y, gate2, plan)
            if self.record is not None:
                self.record.append(x)
        return self.norm(x)


class FinalLayer(nn.Module):
    """adaLN, then a linear map to the prediction. (B, L, e) → (B, L, channels)."""

    def __init__(self, width: int, width_cond: int, channels: int) -> None:
        super().__init__()
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(width_cond, 2 * width))
        self.linear = nn.Linear(width, channels)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaln(c).chunk(2, dim=1)
        return self.linear(adaln_modulate(x, shift, scale))
