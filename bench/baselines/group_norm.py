"""GroupNorm and SiLU one after the other, with the conditioning in front."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def group_norm_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    """x (B, C, H, W), cond (B, C) → (B, C, H, W)."""
    return F.silu(F.group_norm(x + cond[:, :, None, None], 32, weight, bias))
