"""varlen_attention: attention inside each sample of a packed batch, with FlashAttention's argument names."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch

from . import flash, flash_calls
from ._check import all_tensors, floating, offsets, one_device, require, shaped, traced
from ._dispatch import current
from ._ops import Backend, Differentiable
from .packing import Packing


def _why_not(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    return None if device.type in ("cpu", "cuda") else f"needs CPU or CUDA tensors, got {device}"


OPERATOR = Differentiable(
    "varlen_attention",
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k",
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float? softmax_scale, bool causal",
    lambda q, **_: torch.empty_like(q, memory_format=torch.contiguous_format),
    plan=False,
    integers=("cu_seqlens_q", "cu_seqlens_k"),
    describe=flash.describe,
    native=Backend("dcdit_kernels.sdpa:varlen_attention", _why_not),
)


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
    causal: bool = False,
    exact: bool = False,
    packing: Packing | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """softmax(q kᵀ · scale) v of each sample's own rows (FlashAttention, arXiv 2307.08691).

    The native back-end is FlashAttention on a GPU in float16 or bfloat16 (flash-attn 4, 3 or 2, or PyTorch's own) and
    PyTorch's efficient attention in float32; elsewhere PyTorch's fused attention sample by sample. On an H100 or H200
    a kernel in Triton takes PyTorch's place where no gradient is needed, nothing is compiled, no mask is causal and no
    sample is above 512 rows. `explain("varlen_attention", q, k, v, …)` says which and why.

    Args:
        q: (Tq, heads, head_dim); k, v: (Tk, heads of k, head_dim); views of a fused qkv are fine. With fewer heads of k
            than of q each serves as many of q's in turn (grouped queries, arXiv 2305.13245).
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,). max_seqlen_q, max_seqlen_k: the longest sample, or more.
        softmax_scale: head_dim ** -0.5 where None.
        causal: row i of a sample's Mq sees its keys up to i + Mk − Mq, as FlashAttention aligns them; a row that sees
            none is zero.
        exact: promises that every row of q, k and v is live.
        packing: q's rows. Its live mask then serves every block; and where no gradient is needed the output
            past the last live row is undefined, which operators with a packing never read: a pass over it less.

    Returns (Tq, heads, head_dim) in q's dtype, or autocast's. Past the last live row the gradients are zero, and so is
    the output, but for `packing`. FlashAttention's gradients agree bit for bit between runs under
    torch.use_deterministic_algorithms(True), at some cost. Raises ValueError or TypeError for shapes, dtypes and
    devices that do not fit; on a CPU also for offsets, and for samples longer than the bound given. On a GPU, which the
    host does not wait for, the rows past that bound are undefined.
    """
    try:
        kind = q.device.type
        rows_q, rows_k, rows_v = q.shape[:1], k.shape[:1], v.shape[:1]
        one_batch = cu_seqlens_q.shape == cu_seqlens_k.shape
    except (AttributeError, RuntimeError):
        all_tensors("varlen_attention", q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        raise
    if torch.is_autocast_enabled(kind) and torch.float64 not in (q.dtype, k.dtype, v.dtype):
        q, k, v = (part.to(torch.get_autocast_dtype(kind)) for part in (q, k, v))  # as PyTorch's own attention
    alike = cu_seqlens_k is cu_seqlens_q and rows_q == rows_k
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    call = {"causal": causal, "uneven": not alike}
    known = False  # whether the lengths are those of a packing, which has been checked
    if traced(q):  # by operators of PyTorch; a graph depends on no length
        name, library = _choose(backend, call | {"gradients": True, "long": True}, *tensors)
    else:
        call["gradients"] = flash.beyond_forward(q, k, v)
        call["long"] = not flash.short(max_seqlen_q, max_seqlen_k)
        try:
            like = [(t.dtype, t.device, t.shape[1:]) for t in tensors]
        except AttributeError:  # NumPy's arrays before 2 have no device
            all_tensors("varlen_attention", q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
            raise
        key = (backend, current.eager, *call.values(), 0 in (*rows_q, *rows_k), *like)
        if key not in _chosen:
            _chosen[key] = _choose(backend, call, *tensors)
        name, library = _chosen[key]
        if packing is not None and alike and cu_seqlens_q is packing.cu_seqlens:
            known = max_seqlen_q is max_seqlen_k is packing.max_seqlen and rows_q[0] == packing.capacity
    if softmax_scale is not None:
        fits = isinstance(softmax_scale, (float, Real, torch.SymFloat)) and -math.inf < softmax_scale < math.inf
        require(fits, "varlen_attention: softmax_scale must be a finite number, got {!r}", softmax_scale)
    if rows_v != rows_k:
        shaped("varlen_attention", "v", v, *k.shape)
    if not one_batch:
        shapes = f"cu_seqlens_q {tuple(cu_seqlens_q.shape)} and cu_seqlens_k {tuple(cu_seqlens_k.shape)}"
        raise ValueError(f"varlen_attention: {shapes} must describe one batch")
    if not known:
        _lengths("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
        if not alike or max_seqlen_k != max_seqlen_q:
            _lengths("k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and (library is None or not library.grouped):
        k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
    inputs: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "softmax_scale": softmax_scale,
        "causal": causal,
    }
    if library is None:
        return OPERATOR(name, **inputs)
    exact = exact or (packing is not None and packing.exact and alike)
    return flash_calls.attend(library, packing, exact, **inputs)


# (request, mask, gradients, length, dtypes, devices, shapes without rows) → the back-end and the library, once checked.
_chosen: dict[tuple[Any, ...], tuple[str, flash.Library | None]] = {}


def _choose(
    backend: str | None,
    call: dict[str, bool],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> tuple[str, flash.Library | None]:
    """The back-end, and on native the library. Raises for dtypes, devices, heads and widths that do not fit."""
    floating("varlen_attention", q=q, k=k, v=v)
    causal = call["causal"]
    require(isinstance(causal, bool), "varlen_attention: causal must be True or False, got {!r}", causal)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"varlen_attention: q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    shaped("varlen_attention", "q", q, None, None, None)
    shaped("varlen_attention", "k", k, None, None, q.shape[2])
    fits = k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0
    require(fits, "varlen_attention: heads of k must divide those of q, {}, got {}", q.shape[1], k.shape[1])
    shaped("varlen_attention", "v", v, *k.shape)
    tensors = {"k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    one_device("varlen_attention", q, tensors)
    name = OPERATOR.choose(backend, q, k, v)
    return name, flash.choose(q, k, v, **call) if name == "native" else None


def _lengths(of: str, cu_seqlens: torch.Tensor, rows: int, max_seqlen: int) -> None:
    """Raise where offsets and their bound do not fit; values of tensors are looked at on a CPU alone."""
    fits = isinstance(max_seqlen, int | torch.SymInt) and max_seqlen >= 0
    require(fits, "varlen_attention: max_seqlen_{} must be a number of rows, got {!r}", of, max_seqlen)
    longest = offsets("varlen_attention", f"cu_seqlens_{of}", cu_seqlens, rows)
    if longest is not None:
        name = f"max_seqlen_{of}"
        require(
            longest <= max_seqlen, "varlen_attention: {} is {}, the longest sample has {}", name, max_seqlen, longest
        )
