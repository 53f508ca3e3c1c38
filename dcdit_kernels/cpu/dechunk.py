"""dechunk on the CPU: smoothing as two small matrix products per axis, plug-back and its gradient as gathers.

Gaussian weights factor over the axes of the grid, so Σ_j w_ij x_j is the blur of p̃·x on the grid and Σ_j w_ij the blur
of p̃ (METHOD section 2): L·(H + W)·D multiply-adds in matrix products instead of M²·D and an M×M matrix of weights.
"""

from __future__ import annotations

import torch

from ..chunk_plan import ChunkPlan
from ..reference._packed import accumulate_dtype
from ..reference.ema import ema_smooth
from ._rows import live_count, segment_sum, with_tail


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
    live = live_count(plan)
    rows = x[:live].to(dtype)
    if smoothing == "gaussian":
        rows = gaussian_smooth(rows, prob, plan, sigma)
    elif smoothing == "ema":
        rows = ema_smooth(with_tail(rows, plan.capacity), prob, plan)[:live]
    if residual is not None:
        residual = residual.to(dtype)
    return PlugBack.apply(rows, prob, residual, plan).to(x.dtype)


def gaussian_smooth(rows: torch.Tensor, prob: torch.Tensor, plan: ChunkPlan, sigma: float) -> torch.Tensor:
    """p̃ x + (1 - p̃) blur(p̃ x) / (blur(p̃) + 1e-8) at the retained cells; (live, D) → (live, D)."""
    cell = plan.token_index[: rows.shape[0]].long()
    confidence = prob.flatten().index_select(0, cell).clamp(1e-4, 1 - 1e-4)[:, None]
    total = _blur(_to_grid(confidence, cell, plan), plan, sigma).index_select(0, cell)
    mixed = _blur(_to_grid(confidence * rows, cell, plan), plan, sigma).index_select(0, cell)
    return torch.lerp(mixed / (total + 1e-8), rows, confidence)


def _to_grid(rows: torch.Tensor, cell: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
    return rows.new_zeros(plan.batch_size * plan.cells, rows.shape[1]).index_copy(0, cell, rows)


def _blur(field: torch.Tensor, plan: ChunkPlan, sigma: float) -> torch.Tensor:
    """Gaussian sums along every axis of the grid, without a border: (B·L, D) → (B·L, D)."""
    width, inner = field.shape[1], 1
    for size in reversed(plan.grid):
        place = torch.arange(size, dtype=field.dtype)
        weight = torch.exp(-(place[:, None] - place).square() / (2 * sigma**2))
        field = torch.matmul(weight, field.view(-1, size, inner * width))
        inner *= size
    return field.view(-1, width)


class PlugBack(torch.autograd.Function):
    """Each cell takes the row that refills it, plus the residual; the gradient goes back through the inverse map."""

    @staticmethod
    def forward(ctx, rows, prob, residual, plan):
        ctx.save_for_backward(rows, prob)
        ctx.plan, ctx.has_residual = plan, residual is not None
        out = _plug(rows, plan)
        if residual is not None:
            out += residual
        return out

    @staticmethod
    def backward(ctx, grad):
        rows, prob = ctx.saved_tensors
        plan = ctx.plan
        grad_rows = grad_prob = None
        if ctx.needs_input_grad[0]:
            offsets = plan.member_offsets[: rows.shape[0] + 1]
            grad_rows = segment_sum(grad.reshape(-1, rows.shape[1]), offsets, plan.member_index)
        if ctx.needs_input_grad[1]:
            # STE: 1 forward; s = max(p, 1 - p) gets Σ_D (∂y · plugged), half of it each way where p = 1/2.
            grad_prob = torch.linalg.vecdot(grad, _plug(rows, plan)) * torch.sign(2 * prob - 1)
        return grad_rows, grad_prob, grad if ctx.has_residual else None, None


def _plug(rows: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
    """(B, L, D): the row that refills each cell, zero where none does."""
    if rows.shape[0] == 0:
        return rows.new_zeros(plan.batch_size, plan.cells, rows.shape[1])
    out = rows.index_select(0, plan.nearest.clamp(min=0))
    if int(plan.nearest.min()) < 0:
        out[plan.nearest < 0] = 0
    return out.view(plan.batch_size, plan.cells, -1)
