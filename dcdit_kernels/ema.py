"""ema_smooth: causal smoothing by confidence inside each sample."""

from __future__ import annotations

import torch

from . import _triton_support
from ._check import all_tensors, packed, shaped
from ._ops import Backend, Differentiable
from .chunk_plan import ChunkPlan
from .packing import Packing

OPERATOR = Differentiable(
    "ema_smooth",
    "Tensor x, Tensor boundary_prob",
    "",
    lambda x, **_: torch.empty_like(x, memory_format=torch.contiguous_format),
    triton=Backend("dcdit_kernels.triton.ema:EmaSmooth", _triton_support.why_not),
)


def ema_smooth(
    x: torch.Tensor, boundary_prob: torch.Tensor, plan: Packing, *, backend: str | None = None
) -> torch.Tensor:
    """x̄_t = p̃_t x_t + (1 - p̃_t) x̄_{t-1} inside each sample, x̄ of its first token being x itself.

    Args:
        x: (capacity, D) packed features.
        boundary_prob: (B, L), one for each cell of a ChunkPlan, or (capacity,), one for each row of any packing;
            p̃ = clamp(p, 1e-4, 1 - 1e-4).

    Returns (capacity, D) in x's dtype, accumulated in float32. Raises ValueError where the shapes do not fit. Source:
    H-Net, arXiv 2507.07955 eq. 5.
    """
    packed("ema_smooth", "x", x, plan)
    try:
        by_cell = len(boundary_prob.shape) == 2
    except (AttributeError, RuntimeError):
        all_tensors("ema_smooth", boundary_prob=boundary_prob)
        raise
    if isinstance(plan, ChunkPlan) and by_cell:
        shaped("ema_smooth", "boundary_prob", boundary_prob, plan.batch_size, plan.cells)
    else:
        shaped("ema_smooth", "boundary_prob", boundary_prob, plan.capacity)
    return OPERATOR(backend, x=x, boundary_prob=boundary_prob, plan=plan)
