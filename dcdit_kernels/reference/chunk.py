"""Segment gathering in plain PyTorch."""

from __future__ import annotations

import torch

from ..chunk_plan import ChunkPlan
from ._packed import take_rows


def chunk(h: torch.Tensor, plan: ChunkPlan, pos_embed: torch.Tensor | None = None) -> torch.Tensor:
    """See `dcdit_kernels.chunk`."""
    packed = take_rows(h.reshape(-1, h.shape[-1]), plan.token_index)
    if pos_embed is not None:
        cell = torch.where(plan.token_index >= 0, plan.token_index % plan.cells, -1)
        packed = packed + take_rows(pos_embed.to(packed.dtype), cell)
    return packed
