"""dechunk on the CPU: sums over the retained cells near each one, plug-back and its gradient, in csrc/dechunk_cpu.cpp.

With K retained cells inside 6σ of a cell on average: T·K·D multiply-adds forward and twice that backward, and each
tensor is read and written once. No (M, M) or (L, M) buffer.
"""

from __future__ import annotations

import math

import torch

from .._autograd import KernelFunction, first_order
from ..chunk_plan import ChunkPlan
from ..reference._packed import accumulate_dtype
from ..reference.ema import ema_smooth
from ._rows import TYPES, kernel, live_count, with_tail


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
        rows = Smooth.apply(rows.contiguous(), prob, plan, sigma)
    elif smoothing == "ema":
        rows = ema_smooth(with_tail(rows, plan.capacity), prob, plan)[:live]
    if residual is not None:
        residual = residual.to(dtype)
    kept = x.dtype if x.dtype in TYPES else dtype
    return PlugBack.apply(rows, prob, residual, plan, kept).to(x.dtype)


class Smooth(KernelFunction):
    """p̃ x + (1 - p̃) s, s = Σ w x / (Σ w + 1e-8), on live rows (T, D). Gradients as derived in `triton/smooth.py`.

    A row's own term, the largest, is left out of the sums and added exactly: where nothing else is near, s is x.
    """

    @staticmethod
    def forward(ctx, rows, prob, plan, sigma):
        cell = plan.token_index[: rows.shape[0]].long()
        own = prob.flatten().index_select(0, cell)
        confidence = own.clamp(1e-4, 1 - 1e-4)
        mixed, others = window_sum(rows, confidence, plan, sigma)
        total = others + 1e-8 + confidence
        share = (1 - confidence) / total
        mixed.addcmul_(rows, (others + 1e-8)[:, None], value=-1)  # (s - x) times the total
        ctx.save_for_backward(rows, own, confidence, mixed, total, share, prob)
        ctx.plan, ctx.sigma, ctx.cell, ctx.prob_shape = plan, sigma, cell, prob.shape
        return torch.addcmul(rows, mixed, share[:, None])

    @staticmethod
    @first_order
    def backward(ctx, grad):
        rows, own, confidence, mixed, total, share, _ = ctx.saved_tensors
        spread, _ = window_sum(grad.contiguous(), share, ctx.plan, ctx.sigma)
        direct = -torch.linalg.vecdot(grad, mixed) / total  # G·(x - s)
        dot = torch.linalg.vecdot(grad, rows) - direct  # G·s
        _, lost = window_sum(grad[:, :0], share * dot, ctx.plan, ctx.sigma)
        factor = 1 + share
        moved = factor * direct + torch.linalg.vecdot(spread, rows) - lost
        moved = torch.where((own >= 1e-4) & (own <= 1 - 1e-4), moved, 0.0)
        grad_prob = rows.new_zeros(math.prod(ctx.prob_shape)).index_copy(0, ctx.cell, moved).view(ctx.prob_shape)
        return spread.addcmul_(grad, factor[:, None]).mul_(confidence[:, None]), grad_prob, None, None


class PlugBack(KernelFunction):
    """Each cell takes the row that refills it, plus the residual, in `dtype`; the gradient goes back through the
    inverse map."""

    @staticmethod
    def forward(ctx, rows, prob, residual, plan, dtype):
        rows = rows.contiguous()
        ctx.save_for_backward(rows, prob)
        ctx.plan, ctx.has_residual = plan, residual is not None
        residual = None if residual is None else residual.contiguous()
        out = rows.new_empty(plan.batch_size, plan.cells, rows.shape[1], dtype=dtype)
        kernel("plug", dtype)(
            plan.nearest.data_ptr(), plan.nearest.numel(), rows.shape[1],
            rows.data_ptr(), 0 if residual is None else residual.data_ptr(), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out

    @staticmethod
    @first_order
    def backward(ctx, grad):
        rows, prob = ctx.saved_tensors
        plan = ctx.plan
        dense = grad.to(rows.dtype).contiguous()
        grad_rows, through = torch.empty_like(rows), prob.new_zeros(prob.shape)  # contiguous, whatever p is
        kernel("plug_backward", rows.dtype)(
            plan.member_offsets.data_ptr(), plan.member_index.data_ptr(), *rows.shape,
            dense.data_ptr(), rows.data_ptr(), grad_rows.data_ptr(), through.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        # STE: 1 forward; s = max(p, 1 - p) gets Σ_D (∂y · plugged), nothing where p = 1/2.
        through *= torch.sign(2 * prob - 1)
        return grad_rows, through, dense if ctx.has_residual else None, None, None


def window_sum(
    x: torch.Tensor, weight: torch.Tensor, plan: ChunkPlan, sigma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ_j k_ij weight_j x_j, Σ_j k_ij weight_j), j ≠ i, over the sample's cells within 6σ (9σ in float64) an axis."""
    out, total = torch.empty_like(x), torch.empty_like(weight)
    radius = min(math.ceil((9 if x.dtype == torch.float64 else 6) * sigma), plan.cells)
    kernel("window_sum", weight.dtype)(
        plan.token_index.data_ptr(), plan.sample_index.data_ptr(),
        plan.cu_seqlens.data_ptr(), *x.shape, (1, 1, *plan.grid)[-3:], radius, sigma,
        x.data_ptr(), weight.contiguous().data_ptr(), out.data_ptr(), total.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out, total
