"""Unpad and pad again by a boolean mask."""

from __future__ import annotations

import torch


def unpad_and_pad(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """x (B, L, D), mask bool (B, L): x where the mask is set, by way of the packed rows, zero elsewhere."""
    rows = x[mask]
    out = rows.new_zeros(x.shape)
    return out.index_put(mask.nonzero(as_tuple=True), rows)
