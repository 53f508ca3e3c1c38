"""Variable-length attention in plain PyTorch: softmax attention inside each sample."""

from __future__ import annotations

import torch

from ._packed import accumulate_dtype


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """See `dcdit_kernels.varlen_attention`."""
    dtype = accumulate_dtype(q)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    ends_q, ends_k = cu_seqlens_q[1:].tolist(), cu_seqlens_k[1:].tolist()
    parts, start_q, start_k = [q[:0].to(dtype)], 0, 0
    for end_q, end_k in zip(ends_q, ends_k, strict=True):
        own_q, own_k = slice(start_q, end_q), slice(start_k, end_k)
        score = torch.einsum("ihd,jhd->hij", q[own_q].to(dtype), k[own_k].to(dtype)) * scale
        weight = _causal_softmax(score) if causal else score.softmax(-1)
        parts.append(torch.einsum("hij,jhd->ihd", weight, v[own_k].to(dtype)))
        start_q, start_k = end_q, end_k
    parts.append(q.new_zeros((q.shape[0] - start_q, *q.shape[1:-1], v.shape[-1]), dtype=dtype))
    return torch.cat(parts).to(q.dtype)


def _causal_softmax(score: torch.Tensor) -> torch.Tensor:
    """Weights (heads, Mq, Mk): row i sees the keys up to i + Mk − Mq, and one that sees none has zeros."""
    rows, keys = score.shape[1:]
    seen = torch.ones(rows, keys, dtype=torch.bool, device=score.device).tril(keys - rows)
    weight = torch.where(seen, score, -torch.inf)[:, max(0, rows - keys) :].softmax(-1)
    return torch.cat([torch.zeros_like(score[:, : max(0, rows - keys)]), weight], dim=1)
