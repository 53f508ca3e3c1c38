"""Boundary scores in plain PyTorch (arXiv 2603.06351 section 3, H-Net arXiv 2507.07955 eq. 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._packed import accumulate_dtype


def force_ends(prob: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
    """p = 1 at the first and the last cell of each sample, without a gradient through those."""
    ends = torch.zeros_like(prob, dtype=torch.bool)
    if cu_seqlens is None:
        ends[:, :1] = ends[:, -1:] = True
    else:
        filled = cu_seqlens.diff() > 0
        ends[cu_seqlens[:-1][filled].long()] = True
        ends[cu_seqlens[1:][filled].long() - 1] = True
    return torch.where(ends, 1.0, prob)


def boundary_cosine(
    q: torch.Tensor,
    k: torch.Tensor,
    kernel: torch.Tensor | None = None,
    grid: tuple[int, int] | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `dcdit_kernels.boundary_cosine`."""
    dtype = accumulate_dtype(q, k)
    if cu_seqlens is not None:
        live = torch.arange(q.shape[0], device=q.device) < cu_seqlens[-1]
        q, k = (torch.where(live[:, None], x, 0.0) for x in (q, k))
    q = F.normalize(q.to(dtype), dim=-1)
    k = F.normalize(k.to(dtype), dim=-1)
    if kernel is not None:
        batch, _, width = k.shape
        field = k.transpose(1, 2).reshape(batch, width, *grid)
        k = F.conv2d(field, kernel.to(dtype)[:, None], padding=1, groups=width).flatten(2).transpose(1, 2)
    else:
        k = torch.roll(k, 1, dims=-2)  # the first cell's wrapped neighbour is overwritten below
        if cu_seqlens is not None:  # no NaN of the sample before, which would reach the gradient
            row = torch.arange(q.shape[0], device=q.device)
            k = torch.where(torch.isin(row, cu_seqlens)[:, None], 0.0, k)
    prob = ((1 - (q * k).sum(-1)) / 2).clamp(0, 1)
    if cu_seqlens is None:
        return force_ends(prob)
    return torch.where(live, force_ends(prob, cu_seqlens), 0.0)


def boundary_predictability(
    features: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    score_weight: torch.Tensor,
    score_bias: torch.Tensor,
    groups: int = 8,
    eps: float = 1e-5,
) -> torch.Tensor:
    """See `dcdit_kernels.boundary_predictability`."""
    dtype = accumulate_dtype(features)
    features = features.to(dtype)
    if torch.is_grad_enabled() and not features.requires_grad:
        features = features.contiguous()  # on channels_last ones PyTorch's backward writes to a gradient nobody made
    normed = F.group_norm(features, groups, norm_weight.to(dtype), norm_bias.to(dtype), eps)
    logit = F.conv2d(F.silu(normed), score_weight.to(dtype)[None, :, None, None], score_bias.to(dtype).view(1))
    return force_ends(torch.sigmoid(logit).flatten(1))
