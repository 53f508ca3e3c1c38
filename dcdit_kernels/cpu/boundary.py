"""The 2D cosine score on the CPU without gradients, in csrc/cosine_cpu.cpp; all else is the reference's."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from .. import reference
from ..reference._packed import accumulate_dtype
from . import _rows


def boundary_cosine(
    q: torch.Tensor,
    k: torch.Tensor,
    kernel: torch.Tensor | None = None,
    grid: tuple[int, int] | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `dcdit_kernels.boundary_cosine`."""
    dtype, parts = accumulate_dtype(q, k), (q, k, kernel)
    wanted = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts)
    if kernel is None or wanted or forward_ad._current_level >= 0:
        return reference.boundary_cosine(q, k, kernel, grid, cu_seqlens)
    q, k = (part.to(dtype).contiguous() for part in (q, k))
    weight = kernel.to(dtype).flatten(1).t().contiguous()  # (9, D)
    out = q.new_empty(q.shape[:2])
    if out.numel():
        _rows.kernel("boundary_cosine", dtype)(
            (q.shape[0], *grid, q.shape[2]), q.data_ptr(), k.data_ptr(), weight.data_ptr(), out.data_ptr(),
            _rows.threads(q),
        )  # fmt: skip
    return out
