"""RMS norm of each head and rotary embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def norm_rope(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """x (T, heads, head_dim), weight (head_dim,), cos and sin (P, head_dim/2), position (T,) → (T, heads, head_dim)."""
    even, odd = F.rms_norm(x, x.shape[-1:], weight, eps=1e-6).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (table[position][:, None].to(x.dtype) for table in (cos, sin))
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
