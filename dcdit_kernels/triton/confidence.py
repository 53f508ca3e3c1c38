"""The confidence p̃ of a token, and the gradient of boundary_prob, which the smoothings and the plug-back share.

Bytes for B·L cells and T rows: B·L·16 read and written, and T·4 for each part.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import jit_kernel
from ._rows import cdiv


@triton.jit
def clamp_confidence(p):
    """p̃ = clamp(p, 1e-4, 1 - 1e-4)."""
    return tl.minimum(tl.maximum(p, 1e-4), 1 - 1e-4)


@jit_kernel(do_not_specialize=["total", "capacity", "parts", "through_parts"])
def prob_backward(
    through_ptr, partial_ptr, prob_ptr, nearest_ptr, token_ptr, out_ptr, total, capacity, parts, through_parts,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """∂p: the straight-through confidence's gradient, and at retained cells the smoothing's."""
    if ALIGNED:
        total = total // 4 * 4  # Triton then sees that four cells share a mask, and loads 16 bytes
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < total
    row = tl.load(nearest_ptr + cell, mask=inside, other=-1).to(tl.int64)
    p = tl.load(prob_ptr + cell, mask=inside, other=0.5)
    out = tl.zeros([BLOCK], tl.float32)
    if through_ptr is not None:
        sign = tl.where(p > 0.5, 1.0, tl.where(p < 0.5, -1.0, 0.0))
        for part in range(0, through_parts):
            through = tl.load(through_ptr + part * total + cell, mask=inside, other=0.0)
            out += tl.where(row >= 0, through, 0.0) * sign
    if partial_ptr is not None:
        own = tl.load(token_ptr + row, mask=row >= 0, other=-1).to(tl.int64) == cell
        moved = own & (p >= 1e-4) & (p <= 1 - 1e-4)
        for part in range(0, parts):
            out += tl.load(partial_ptr + part * capacity + row, mask=moved, other=0.0)
    tl.store(out_ptr + cell, out, mask=inside)


def prob_gradient(boundary_prob, prob, plan, partial, through=None):
    """∂p (B, L) in boundary_prob's dtype, from the parts of dp̃ (parts, capacity) and of Σ ∂y·plugged (parts, B·L)."""
    total = plan.batch_size * plan.cells
    out = torch.empty(total, dtype=torch.float32, device=prob.device)
    if total:
        prob_backward[(cdiv(total, 1024),)](
            through, partial, prob, plan.nearest, plan.token_index, out, total, plan.capacity,
            *(0 if parts is None else parts.shape[0] for parts in (partial, through)),
            ALIGNED=plan.cells % 4 == 0, BLOCK=1024,
        )  # fmt: skip
    return out.view(boundary_prob.shape).to(boundary_prob.dtype)
