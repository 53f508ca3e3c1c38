"""varlen_attention: attention inside each sample of a packed batch, with FlashAttention's argument names."""

from __future__ import annotations

import torch

from . import _dispatch
from ._check import floating, require, shaped
from .cpu._rows import why_not as cpu_why_not

_dispatch.register_reference("varlen_attention")
_dispatch.register("varlen_attention", "native", "dcdit_kernels.cpu.attention:varlen_attention", cpu_why_not)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """softmax(q kᵀ · scale) v of each sample's own rows (FlashAttention, arXiv 2307.08691).

    Args:
        q: (Tq, heads, head_dim); k, v: (Tk, heads, head_dim); views of a fused qkv are fine.
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,). max_seqlen_q, max_seqlen_k: upper bounds of the lengths.
        softmax_scale: head_dim ** -0.5 where None.

    Returns (Tq, heads, head_dim) in q's dtype, zero past the last live row.
    """
    floating("varlen_attention", q=q, k=k, v=v)
    shaped("varlen_attention", "q", q, None, None, None)
    shaped("varlen_attention", "k", k, None, q.shape[1], q.shape[2])
    shaped("varlen_attention", "v", v, *k.shape)
    require(
        cu_seqlens_q.shape == cu_seqlens_k.shape,
        f"varlen_attention: cu_seqlens_q {tuple(cu_seqlens_q.shape)} and cu_seqlens_k "
        f"{tuple(cu_seqlens_k.shape)} must describe one batch",
    )
    return _dispatch.run(
        "varlen_attention",
        backend,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
    )
