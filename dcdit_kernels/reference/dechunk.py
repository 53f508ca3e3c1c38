"""Dechunk in plain PyTorch: smoothing by confidence, plug-back, straight-through confidence, residual."""

from __future__ import annotations

import torch

from ..chunk_plan import ChunkPlan
from ._packed import accumulate_dtype, live_rows, take_rows
from .ema import ema_smooth, token_confidence


def dechunk(
    x: torch.Tensor,
    boundary_prob: torch.Tensor,
    plan: ChunkPlan,
    residual: torch.Tensor | None = None,
    sigma: float = 1.0,
    smoothing: str | None = "gaussian",
) -> torch.Tensor:
    """See `dcdit_kernels.dechunk`."""
    dtype = accumulate_dtype(x)
    prob = boundary_prob.to(dtype)
    rows = torch.where(live_rows(plan), x, 0.0).to(dtype)
    if smoothing == "gaussian":
        rows = gaussian_smooth(rows, prob, plan, sigma)
    elif smoothing == "ema":
        rows = ema_smooth(rows, prob, plan)
    plugged = take_rows(rows, plan.nearest).view(plan.batch_size, plan.cells, x.shape[1])
    confidence = torch.maximum(prob, 1 - prob)[..., None]
    y = plugged * (1 + confidence - confidence.detach())  # 1 forward, the gradient reaches the confidence
    if residual is not None:
        y = y + residual.to(dtype)
    return y.to(x.dtype)


def gaussian_smooth(rows: torch.Tensor, prob: torch.Tensor, plan: ChunkPlan, sigma: float) -> torch.Tensor:
    """p̃_i x_i + (1 - p̃_i) Σ_j w_ij x_j / (Σ_j w_ij + 1e-8), w_ij = p̃_j exp(-|u_i - u_j|² / 2σ²)."""
    confidence = token_confidence(prob, plan)
    place = torch.stack(torch.unravel_index(plan.token_index.clamp(min=0) % plan.cells, plan.grid), dim=1)
    place = place.to(rows.dtype)
    smoothed, start = [], 0
    for end in plan.cu_seqlens[1:].tolist():
        own = slice(start, end)
        distance = (place[own, None] - place[None, own]).square().sum(-1)
        weight = confidence[own] * torch.exp(-distance / (2 * sigma**2))
        smoothed.append((weight @ rows[own]) / (weight.sum(1, keepdim=True) + 1e-8))
        start = end
    smoothed = torch.cat([*smoothed, rows[start:]])
    return confidence[:, None] * rows + (1 - confidence[:, None]) * smoothed
