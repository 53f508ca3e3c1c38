"""Attention on a padded batch with a mask over the keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .plan import pad_rows


def attention(qkv: torch.Tensor, valid: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """qkv (T, 3, heads, head_dim) packed, a plan's `valid` and `places` → pad, attend, unpad → (T, heads, head_dim)."""
    q, k, v = pad_rows(qkv, valid, place).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None])
    return out.transpose(1, 2).flatten(0, 1).index_select(0, place)
