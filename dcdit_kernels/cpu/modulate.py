"""Varlen adaLN on the CPU: each row's modulators are gathered once, and backward sums them by segment."""

from __future__ import annotations

import torch

from ..chunk_plan import ChunkPlan
from ..reference._packed import accumulate_dtype
from ._rows import live_count, segment_sum, with_tail


def adaln_modulate(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, plan: ChunkPlan | None = None, eps: float = 1e-6
) -> torch.Tensor:
    """See `dcdit_kernels.adaln_modulate`."""
    return _packed(x, plan, lambda rows, segments: Modulate.apply(rows, shift, scale, segments, eps))


def gate_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, plan: ChunkPlan | None = None) -> torch.Tensor:
    """See `dcdit_kernels.gate_residual`."""
    rows_y = _rows(y, plan)
    return _packed(x, plan, lambda rows, segments: Gate.apply(rows, rows_y, gate, segments))


def gate_residual_modulate(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    plan: ChunkPlan | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `dcdit_kernels.gate_residual_modulate`."""
    x = gate_residual(x, y, gate, plan)
    return x, adaln_modulate(x, shift, scale, plan, eps)


class Modulate(torch.autograd.Function):
    """LayerNorm(x) · (1 + scale_b) + shift_b on rows (N, D)."""

    @staticmethod
    def forward(ctx, x, shift, scale, segments, eps):
        offsets, sample = segments
        dtype = accumulate_dtype(x)
        wide = x.to(dtype)
        normed, mean, rstd = torch.native_layer_norm(wide, x.shape[-1:], None, None, eps)
        factor = (1 + scale.to(dtype)).index_select(0, sample)
        ctx.save_for_backward(wide, normed, mean, rstd, factor, offsets)
        ctx.dtypes = x.dtype, shift.dtype, scale.dtype
        return torch.addcmul(shift.to(dtype).index_select(0, sample), normed, factor).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        wide, normed, mean, rstd, factor, offsets = ctx.saved_tensors
        grad = grad.to(wide.dtype)
        grad_x = torch.ops.aten.native_layer_norm_backward(
            grad * factor, wide, wide.shape[-1:], mean, rstd, None, None, [True, False, False]
        )[0]
        grad_shift, grad_scale = segment_sum(grad, offsets), segment_sum(grad * normed, offsets)
        return grad_x.to(ctx.dtypes[0]), grad_shift.to(ctx.dtypes[1]), grad_scale.to(ctx.dtypes[2]), None, None


class Gate(torch.autograd.Function):
    """x + gate_b · y on rows (N, D)."""

    @staticmethod
    def forward(ctx, x, y, gate, segments):
        offsets, sample = segments
        dtype = accumulate_dtype(x, y)
        factor = gate.to(dtype).index_select(0, sample)
        ctx.save_for_backward(y, factor, offsets)
        ctx.gate_dtype = gate.dtype
        return torch.addcmul(x.to(dtype), factor, y.to(dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        y, factor, offsets = ctx.saved_tensors
        wide = grad.to(factor.dtype)
        grad_gate = segment_sum(wide * y, offsets).to(ctx.gate_dtype)
        return grad, (wide * factor).to(y.dtype), grad_gate, None


def _rows(x: torch.Tensor, plan: ChunkPlan | None) -> torch.Tensor:
    """The live rows (N, D) of a packed or dense input."""
    return x.reshape(-1, x.shape[-1]) if plan is None else x[: live_count(plan)]


def _packed(x: torch.Tensor, plan: ChunkPlan | None, operator) -> torch.Tensor:
    """Run `operator(rows, (offsets, sample))` on the live rows, and put its result into x's shape."""
    if plan is None:
        batch, cells, width = x.shape
        offsets = torch.arange(batch + 1, dtype=torch.int32) * cells
        sample = torch.arange(batch, dtype=torch.int32).repeat_interleave(cells)
        return operator(x.reshape(-1, width), (offsets, sample)).view(x.shape)
    rows = _rows(x, plan)
    return with_tail(operator(rows, (plan.cu_seqlens, plan.sample_index[: rows.shape[0]])), plan.capacity)
