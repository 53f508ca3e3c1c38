"""Segment gathering in plain PyTorch."""

from __future__ import annotations

import torch

from ..chunk_plan import ChunkPlan
from ._packed import accumulate_dtype, take_rows


def chunk(h: torch.Tensor, plan: ChunkPlan, pos_embed: torch.Tensor | None = None, reduce: str = "own") -> torch.Tensor:
    """See `dcdit_kernels.chunk`."""
    cells = h.reshape(-1, h.shape[-1])
    packed = take_rows(cells, plan.token_index) if reduce == "own" else segment_mean(cells, plan)
    if pos_embed is not None:
        packed = packed + take_rows(pos_embed.to(h.dtype), plan.cell_index)
    return packed.to(h.dtype)


def segment_mean(cells: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
    """cells (B·L, D) → the mean over the cells that each row refills, (capacity, D) in float32 or float64."""
    refills = torch.where(plan.nearest < 0, plan.capacity, plan.nearest)  # no row: one past the last
    sums = cells.new_zeros(plan.capacity + 1, cells.shape[1], dtype=accumulate_dtype(cells))
    sums = sums.index_add(0, refills, cells.to(sums.dtype))[:-1]
    return sums / plan.member_offsets.diff().clamp(min=1)[:, None]
