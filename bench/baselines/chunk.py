"""Gather into a padded batch."""

from __future__ import annotations

import torch

from .plan import PaddedPlan


def chunk(h: torch.Tensor, padded: PaddedPlan, pos_embed: torch.Tensor) -> torch.Tensor:
    """h (B, L, D), pos_embed (L, D) → (B, M, D), zero past each sample's last token."""
    tokens = h.gather(1, padded.index[..., None].expand(-1, -1, h.shape[2])) + pos_embed[padded.index]
    return tokens * padded.valid[..., None]
