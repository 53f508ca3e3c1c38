"""Varlen adaLN on the CPU, in csrc/modulate_cpu.cpp: rows are read once and written once, forward and backward.

Modulators are looked up by cu_seqlens; their gradients are summed per sample, in an order that threads do not change.
"""

from __future__ import annotations

import torch

from .._autograd import KernelFunction, first_order
from ..packing import Packing
from ..reference._packed import accumulate_dtype
from ._rows import address, kernel, live_count, threads, with_tail


def adaln_modulate(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    plan: Packing | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
    norm_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `dcdit_kernels.adaln_modulate`."""
    return _run(plan, x, None, None, shift, scale, norm_weight, (eps, norm == "layer"))[1]


def gate_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, plan: Packing | None = None) -> torch.Tensor:
    """See `dcdit_kernels.gate_residual`."""
    return _run(plan, x, y, gate, None, None, None, (0.0, False))[0]


def gate_residual_modulate(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    plan: Packing | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
    norm_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `dcdit_kernels.gate_residual_modulate`."""
    return _run(plan, x, y, gate, shift, scale, norm_weight, (eps, norm == "layer"))


def _run(plan, x, y, gate, shift, scale, weight, norm) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(x', modulated x') in the shape and dtype of x; without y no x', without scale nothing modulated."""
    features = [x] if y is None else [x, y]
    dtype = total = accumulate_dtype(*features)
    if not _graph(*features, gate, shift, scale, weight) and all(part.dtype is torch.bfloat16 for part in features):
        dtype = torch.bfloat16  # widened as it is read
    if plan is None:
        cu_seqlens = torch.arange(x.shape[0] + 1, dtype=torch.int32, device="cpu") * x.shape[1]
        live = slice(None)
    else:
        cu_seqlens, live = plan.cu_seqlens, slice(live_count(plan))
    rows, rows_y = (
        None if part is None else part[live].to(dtype).contiguous().view(-1, x.shape[-1]) for part in (x, y)
    )
    # Modulators keep the distance of their rows: they are views of one (B, 6·D) tensor.
    modulators = (
        part if part is None or part.stride(1) == 1 else part.contiguous()
        for part in (None if part is None else part.to(total) for part in (gate, shift, scale))
    )
    weight = None if weight is None else weight.to(total).contiguous()
    outputs = AdaLN.apply(rows, rows_y, *modulators, weight, cu_seqlens, norm)
    if plan is None:
        return tuple(part if part is None else part.view(x.shape).to(x.dtype) for part in outputs)
    return tuple(part if part is None else with_tail(part.to(x.dtype), plan.capacity) for part in outputs)


class AdaLN(KernelFunction):
    """x' = x + gate_b · y and norm(x') · weight · (1 + scale_b) + shift_b on rows (T, D).

    `norm` is (eps, whether a mean is subtracted).
    """

    @staticmethod
    def forward(ctx, x, y, gate, shift, scale, weight, cu_seqlens, norm):
        new_x = None if y is None else torch.empty_like(x)
        out = None if scale is None else torch.empty_like(x)
        kernel("modulate", x.dtype)(
            *_sizes(x, cu_seqlens), *norm, x.data_ptr(), address(y), _modulators(gate, shift, scale), address(weight),
            address(new_x), address(out), threads(x),
        )  # fmt: skip
        normed = None if scale is None else x if y is None else new_x
        ctx.save_for_backward(normed, y, gate, scale, weight, cu_seqlens)
        ctx.norm = norm
        ctx.set_materialize_grads(False)
        return new_x, out

    @staticmethod
    @first_order
    def backward(ctx, grad_new_x, grad_out):
        normed, y, gate, scale, weight, cu_seqlens = ctx.saved_tensors
        like = y if normed is None else normed
        grad_new_x, grad_out = (grad if grad is None else grad.contiguous() for grad in (grad_new_x, grad_out))
        if grad_new_x is None and grad_out is None:
            return (None,) * 8
        grad_x, grad_y = torch.empty_like(like), None if y is None else torch.empty_like(y)
        shape = len(cu_seqlens) - 1, like.shape[1]
        grad_gate = None if y is None else like.new_empty(shape)
        grad_shift, grad_normed = (None if scale is None else like.new_empty(shape) for _ in range(2))
        kernel("modulate_backward", like.dtype)(
            *_sizes(like, cu_seqlens), *ctx.norm, address(normed), address(y), _modulators(gate, None, scale),
            address(weight), address(grad_new_x), address(grad_out), grad_x.data_ptr(), address(grad_y),
            [address(grad) for grad in (grad_gate, grad_shift, grad_normed)], threads(like),
        )  # fmt: skip
        if weight is None:
            return grad_x, grad_y, grad_gate, grad_shift, grad_normed, None, None, None
        grad_weight = ((1 + scale) * grad_normed).sum(0)
        return grad_x, grad_y, grad_gate, grad_shift, grad_normed * weight, grad_weight, None, None


def _graph(*parts: torch.Tensor | None) -> bool:
    """Whether a gradient of one of them is wanted, which takes the rows in the dtype of the sums."""
    return torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts)


def _sizes(x: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[int, int, int]:
    return cu_seqlens.data_ptr(), len(cu_seqlens) - 1, x.shape[1]


def _modulators(*parts: torch.Tensor | None) -> list[tuple[int, int]]:
    return [(address(part), 0 if part is None else part.stride(0)) for part in parts]
