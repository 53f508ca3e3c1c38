"""Smoothing with M×M weights, plug-back by a gather, straight-through confidence."""

from __future__ import annotations

import torch

from .plan import PaddedPlan


def dechunk(
    x: torch.Tensor,
    prob: torch.Tensor,
    padded: PaddedPlan,
    residual: torch.Tensor,
    grid: tuple[int, int],
    sigma: float = 1.0,
) -> torch.Tensor:
    """x (B, M, D), prob (B, L), residual (B, L, D) → (B, L, D), in float32 or better inside."""
    wide = x.to(torch.promote_types(x.dtype, prob.dtype))
    p = prob.gather(1, padded.index).clamp(1e-4, 1 - 1e-4)
    place = torch.stack([padded.index // grid[1], padded.index % grid[1]], dim=2).to(wide.dtype)
    distance = (place[:, :, None] - place[:, None]).square().sum(-1)
    weight = (p * padded.valid)[:, None] * torch.exp(-distance / (2 * sigma**2))
    smoothed = (weight @ wide) / (weight.sum(2, keepdim=True) + 1e-8)
    out = p[..., None] * wide + (1 - p[..., None]) * smoothed
    plugged = out.gather(1, padded.nearest[..., None].expand(-1, -1, x.shape[2]))
    confidence = torch.maximum(prob, 1 - prob)[..., None]
    return (plugged * (1 + confidence - confidence.detach()) + residual).to(x.dtype)
