"""Row gather and scatter in plain PyTorch."""

from __future__ import annotations

import torch


def pack_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """See `dcdit_kernels.pack_rows`. An index of -1 takes the row of zeros put last."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[index.long()]


def unpack_rows(x: torch.Tensor, index: torch.Tensor, rows: int) -> torch.Tensor:
    """See `dcdit_kernels.unpack_rows`. An index of -1 writes to a last row that is cut off."""
    return x.new_zeros(rows + 1, *x.shape[1:]).index_copy(0, torch.where(index < 0, rows, index).long(), x)[:rows]
