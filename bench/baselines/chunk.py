"""Gather into a padded batch."""

from __future__ import annotations

import torch

from .plan import PaddedPlan


def chunk(h: torch.Tensor, padded: PaddedPlan, pos_embed: torch.Tensor) -> torch.Tensor:
    """h (B, L, D), pos_embed (L, D) → (B, M, D), zero past each sample's last token."""
    tokens = h.gather(1, padded.index[..., None].expand(-1, -1, h.shape[2])) + pos_embed[padded.index]
    return tokens * padded.valid[..., None]


def segment_means(h: torch.Tensor, nearest: torch.Tensor, rows: int) -> torch.Tensor:
    """h (B, L, D), the row that refills each cell (B·L,) → the means of the rows' cells (rows, D)."""
    sums = h.new_zeros(rows, h.shape[2]).index_add(0, nearest, h.flatten(0, 1))
    return sums / torch.zeros_like(sums[:, :1]).index_add(0, nearest, torch.ones_like(h.view(-1, h.shape[2])[:, :1]))
