"""varlen_attention: attention inside each sample of a packed batch, with FlashAttention's argument names."""

from __future__ import annotations

from typing import Any

import torch

from . import _dispatch, _ops, flash
from ._check import floating, offsets, one_device, require, shaped


def _native_why_not(q: torch.Tensor, *_: Any, **__: Any) -> str | None:
    return None if q.device.type in ("cpu", "cuda") else f"needs CPU or CUDA tensors, got {q.device}"


_ops.define(
    "varlen_attention",
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k",
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float? softmax_scale",
    lambda q, **_: torch.empty_like(q, memory_format=torch.contiguous_format),
    plan=False,
)
_dispatch.register_reference("varlen_attention")
_dispatch.register("varlen_attention", "native", "dcdit_kernels.cpu.attention:varlen_attention", _native_why_not)
_dispatch.register_details("varlen_attention", flash.describe)


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
    exact: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """softmax(q kᵀ · scale) v of each sample's own rows (FlashAttention, arXiv 2307.08691).

    The native back-end is flash-attn 4, 3 or 2 or torch's varlen_attn on a GPU, in float16 or bfloat16; elsewhere
    PyTorch's fused attention sample by sample. `explain("varlen_attention", q, k, v, …)` says which and why.

    Args:
        q: (Tq, heads, head_dim); k, v: (Tk, heads, head_dim); views of a fused qkv are fine.
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,). max_seqlen_q, max_seqlen_k: upper bounds of the lengths.
        softmax_scale: head_dim ** -0.5 where None.
        exact: promises that every row of q, k and v is live (`ChunkPlan.exact`), so that FlashAttention's tails need
            not be zeroed: a pass over the output and one over each gradient less.

    Returns (Tq, heads, head_dim) in q's dtype, or autocast's; zero past the last live row. FlashAttention's gradients
    agree bit for bit between runs under torch.use_deterministic_algorithms(True), at some cost. Raises ValueError or
    TypeError for shapes, dtypes, devices and, on a CPU, offsets that do not fit.
    """
    floating("varlen_attention", q=q, k=k, v=v)
    kind = q.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (q.dtype, k.dtype, v.dtype):
        q, k, v = (part.to(torch.get_autocast_dtype(kind)) for part in (q, k, v))  # as PyTorch's own attention
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"varlen_attention: q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    shaped("varlen_attention", "q", q, None, None, None)
    shaped("varlen_attention", "k", k, None, q.shape[1], q.shape[2])
    shaped("varlen_attention", "v", v, *k.shape)
    offsets("varlen_attention", "cu_seqlens_q", cu_seqlens_q, q.shape[0])
    if cu_seqlens_k is not cu_seqlens_q or k.shape[0] != q.shape[0]:
        offsets("varlen_attention", "cu_seqlens_k", cu_seqlens_k, k.shape[0])
    shapes = tuple(cu_seqlens_q.shape), tuple(cu_seqlens_k.shape)
    require(
        shapes[0] == shapes[1], "varlen_attention: cu_seqlens_q {} and cu_seqlens_k {} must describe one batch", *shapes
    )
    tensors = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    inputs: dict[str, Any] = {
        **tensors,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "softmax_scale": softmax_scale,
    }
    name = _dispatch.choose("varlen_attention", backend, **inputs)
    library = flash.choose(q, k, v) if name == "native" else None
    if library is None:
        return _ops.run("varlen_attention", name, **inputs)
    one_device("varlen_attention", q, tensors)
    return flash.attend(library, exact, **inputs)
