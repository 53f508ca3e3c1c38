"""ema_smooth: causal smoothing by confidence inside each sample."""

from __future__ import annotations

import torch

from . import _dispatch, _ops, _triton_support
from ._check import floating, packed, shaped
from .chunk_plan import ChunkPlan
from .cpu._rows import why_not as cpu_why_not

_ops.define(
    "ema_smooth",
    "Tensor x, Tensor boundary_prob",
    "",
    lambda x, **_: torch.empty_like(x, memory_format=torch.contiguous_format),
)
_dispatch.register_reference("ema_smooth")
_dispatch.register("ema_smooth", "native", "dcdit_kernels.reference:ema_smooth", cpu_why_not)
_dispatch.register("ema_smooth", "triton", "dcdit_kernels.triton.ema:EmaSmooth", _triton_support.why_not)


def ema_smooth(
    x: torch.Tensor, boundary_prob: torch.Tensor, plan: ChunkPlan, *, backend: str | None = None
) -> torch.Tensor:
    """x̄_t = p̃_t x_t + (1 - p̃_t) x̄_{t-1} inside each sample, x̄ of its first token being x itself.

    Args:
        x: (capacity, D) packed features. boundary_prob: (B, L); p̃ = clamp(p, 1e-4, 1 - 1e-4).

    Returns (capacity, D) in x's dtype, accumulated in float32. Source: H-Net, arXiv 2507.07955 eq. 5.
    """
    floating("ema_smooth", x=x, boundary_prob=boundary_prob)
    packed("ema_smooth", "x", x, plan)
    shaped("ema_smooth", "boundary_prob", boundary_prob, plan.batch_size, plan.cells)
    return _ops.run("ema_smooth", backend, x=x, boundary_prob=boundary_prob, plan=plan)
