"""GroupNorm and SiLU in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._packed import accumulate_dtype


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    cond: torch.Tensor | None = None,
    x_bias: torch.Tensor | None = None,
    groups: int = 32,
    eps: float = 1e-5,
) -> torch.Tensor:
    """See `dcdit_kernels.group_norm_silu`."""
    dtype = accumulate_dtype(x)
    z = x.to(dtype)
    offsets = [offset.to(dtype).view(-1, x.shape[1]) for offset in (cond, x_bias) if offset is not None]
    if offsets:
        z = z + sum(offsets)[:, :, None, None]
    if torch.is_grad_enabled() and not z.requires_grad:
        z = z.contiguous()  # on channels_last ones PyTorch's backward writes to a gradient nobody made
    normed = F.group_norm(z, groups, weight.to(dtype), bias.to(dtype), eps)
    out = F.silu(normed, inplace=not normed.requires_grad)
    return out.to(x.dtype).contiguous(memory_format=torch.channels_last)
