"""adaLN and gate with the modulators expanded to one row per token."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gate_modulate(
    x: torch.Tensor, y: torch.Tensor, modulators: torch.Tensor, sample_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, y (T, D), modulators (B, 6·D) in DiT's order, sample_index int64 (T,): between the two halves of a block."""
    _, _, gate, shift, scale, _ = modulators[sample_index].chunk(6, dim=1)  # (T, 6·D)
    x = x + gate * y
    return x, F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
