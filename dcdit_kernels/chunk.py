"""chunk: gather the retained cells, or the means of their segments, into one packed tensor."""

from __future__ import annotations

import torch

from . import _triton_support
from ._check import CHUNK_PLAN, no_plan, shaped
from ._ops import Backend, Differentiable
from .chunk_plan import ChunkPlan
from .cpu import _rows

REDUCTIONS = ("own", "mean")

OPERATOR = Differentiable(
    "chunk",
    "Tensor h, Tensor? pos_embed",
    "str reduce",
    lambda h, pos_embed, plan, reduce: h.new_empty(plan.capacity, h.shape[2]),
    unread=("h",),
    native=Backend("dcdit_kernels.cpu.chunk:Chunk", _rows.why_not),
    triton=Backend("dcdit_kernels.triton.chunk:Chunk", _triton_support.why_not),
)


def chunk(
    h: torch.Tensor,
    plan: ChunkPlan,
    pos_embed: torch.Tensor | None = None,
    reduce: str = "own",
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """packed[r] = h[token_index[r]] + pos_embed[cell of r], in raster order, sample after sample.

    With "mean" a row takes the mean over its segment, the cells that it will refill, in the place of its own cell:
    packed[r] = Σ h[c] / |{c}| + pos_embed[cell of r] over the cells c with nearest[c] = r.

    Args:
        h: (B, L, D).
        pos_embed: (L, D), the position embedding of each cell of the grid, or None.
        reduce: "own", the paper's, or "mean", with sums in float32 (float64 for float64).

    Returns (capacity, D) in h's dtype, zero past the last live row. Raises ValueError where the shapes do not fit.
    Source: arXiv 2603.06351 section 3; the mean is this project's.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"chunk: reduce must be one of {REDUCTIONS}, got {reduce!r}")
    try:
        cells = plan.cells
    except AttributeError:
        raise no_plan("chunk", plan, CHUNK_PLAN) from None
    shaped("chunk", "h", h, plan.batch_size, cells, None)
    if pos_embed is not None:
        shaped("chunk", "pos_embed", pos_embed, cells, h.shape[2])
    return OPERATOR(backend, h=h, pos_embed=pos_embed, plan=plan, reduce=reduce)
