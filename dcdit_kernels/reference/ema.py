"""Causal exponential smoothing by confidence in plain PyTorch (H-Net, arXiv 2507.07955 eq. 5)."""

from __future__ import annotations

import torch

from ..packing import Packing
from ._packed import accumulate_dtype, live_rows, take_rows


def ema_smooth(x: torch.Tensor, boundary_prob: torch.Tensor, plan: Packing) -> torch.Tensor:
    """See `dcdit_kernels.ema_smooth`. One step per row of the longest sample."""
    dtype = accumulate_dtype(x)
    confidence = token_confidence(boundary_prob.to(dtype), plan)
    live = live_rows(plan)
    rows = torch.where(live, x, 0.0).to(dtype)
    first = torch.zeros(plan.capacity, dtype=torch.bool, device=x.device)
    first[plan.cu_seqlens[:-1][plan.lengths > 0].long()] = True
    # Rows of one step are one per sample, so the loop runs over positions and not over tokens.
    position = torch.arange(plan.capacity, device=x.device) - take_start(plan)
    state = torch.zeros(plan.batch_size, x.shape[1], dtype=dtype, device=x.device)
    smoothed, order = [rows[:0]], [position[:0]]
    for step in range(plan.max_seqlen):
        row = ((position == step) & live[:, 0]).nonzero().squeeze(1)
        sample = plan.sample_index[row].long()
        weight = torch.where(first[row, None], 1.0, confidence[row, None])
        value = weight * rows[row] + (1 - weight) * state[sample]
        state = state.index_copy(0, sample, value)
        smoothed.append(value)
        order.append(row)
    return torch.zeros_like(rows).index_copy(0, torch.cat(order), torch.cat(smoothed)).to(x.dtype)


def take_start(plan: Packing) -> torch.Tensor:
    """First packed row of each row's sample, int64 (capacity,)."""
    return plan.cu_seqlens[plan.sample_index.clamp(min=0).long()].long()


def token_confidence(boundary_prob: torch.Tensor, plan: Packing) -> torch.Tensor:
    """p̃ of each packed row, clamped to [1e-4, 1 - 1e-4]; 0 past the last live one. (capacity,)

    `boundary_prob` is (B, L), by cell, or (capacity,), by row.
    """
    prob = boundary_prob.clamp(1e-4, 1 - 1e-4)
    if prob.dim() == 1:
        return torch.where(plan.sample_index >= 0, prob, 0.0)
    return take_rows(prob.reshape(-1, 1), plan.token_index).squeeze(1)
