"""Helpers that every packed reference operator shares: live rows, per-sample rows, accumulation dtype."""

from __future__ import annotations

import torch

from ..packing import Packing


def accumulate_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float32, or float64 as soon as one input has it."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def live_rows(packing: Packing) -> torch.Tensor:
    """bool (capacity, 1): rows that hold a token."""
    return packing.live[:, None]


def take_rows(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of `table` (N, D) at `index`, and zero rows (in the gradient too) where the index is -1."""
    rows = table.index_select(0, index.clamp(min=0)) if table.shape[0] else table.new_zeros(len(index), table.shape[1])
    return torch.where((index >= 0)[:, None], rows, 0.0)
