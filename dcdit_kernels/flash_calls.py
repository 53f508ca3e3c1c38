"""How each library of `flash` is called, and the fate of the rows past the last live one.

No library writes those rows, neither of the output nor of the gradients: they keep the memory's old values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from . import flash
from ._ops import on_device
from .packing import Packing

# cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k.
Lengths = tuple[torch.Tensor, torch.Tensor, int, int]


def attend(
    library: flash.Library,
    packing: Packing | None,
    exact: bool,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    causal: bool = False,
) -> torch.Tensor:
    """Attention by this library. See `dcdit_kernels.varlen_attention` for the rows past the last live one.

    Gradients agree bit for bit between runs under torch.use_deterministic_algorithms(True); faster without.
    """
    call = CALLS[library.keywords]
    if cu_seqlens_q.dtype != torch.int32 or cu_seqlens_k.dtype != torch.int32:
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.int(), cu_seqlens_k.int()
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if exact or (packing is not None and not gradients and not library.reads_past):
        return call(library, q, k, v, lengths, softmax_scale, causal)
    live_q = _live(q, cu_seqlens_q) if packing is None else packing.live[:, None, None]
    one = cu_seqlens_k is cu_seqlens_q and k.shape[0] == q.shape[0]
    live_k = live_q if one else _live(k, cu_seqlens_k)
    zero = q.new_zeros(())
    if library.reads_past:
        q, k, v = (torch.where(live, x, zero) for live, x in ((live_q, q), (live_k, k), (live_k, v)))
        return torch.where(live_q, call(library, q, k, v, lengths, softmax_scale, causal), zero)
    if gradients:
        q, k, v = (_LiveGradient.apply(x, live, zero) for x, live in ((q, live_q), (k, live_k), (v, live_k)))
    return _LiveRows.apply(call(library, q, k, v, lengths, softmax_scale, causal), live_q, zero)


def _live(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """bool (T, 1, 1): rows before the last live one's end, without waiting for the device."""
    return (torch.arange(x.shape[0], device=x.device) < cu_seqlens[-1])[:, None, None]


class _LiveRows(torch.autograd.Function):
    """x, zero where no live row is; a backward that reads live rows alone gets its gradient as it comes."""

    @staticmethod
    def forward(ctx, x, live, zero):
        return torch.where(live, x, zero)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


class _LiveGradient(torch.autograd.Function):
    """x itself; its gradient is zero where no live row is."""

    @staticmethod
    def forward(ctx, x, live, zero):
        ctx.save_for_backward(live, zero)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        live, zero = ctx.saved_tensors
        return torch.where(live, grad, zero), None, None


def _flash(library, q, k, v, lengths: Lengths, softmax_scale, causal):
    function, _ = flash.found(library)
    options = {"softmax_scale": softmax_scale, "causal": causal}
    if torch.are_deterministic_algorithms_enabled():
        options["deterministic"] = True
    out = function(**dict(zip(flash.KEYWORDS, (q, k, v, *lengths), strict=True)), **options)
    return out[0] if isinstance(out, tuple) else out  # flash-attn 4 and the first 3 return (out, logsumexp)


def _varlen_attn(library, q, k, v, lengths: Lengths, softmax_scale, causal):
    function, parameters = flash.found(library)
    q, k, v = (_dense_heads(x) for x in (q, k, v))
    options = {}
    if softmax_scale is not None and "scale" in parameters:
        options["scale"] = softmax_scale
    elif softmax_scale is not None:  # torch 2.10 always scales by head_dim ** -0.5
        q = q * (softmax_scale * math.sqrt(q.shape[2]))
    if causal:  # named is_causal in torch 2.10
        options |= {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    return function(**dict(zip(flash.TORCH_KEYWORDS, (q, k, v, *lengths), strict=True)), **options)


def _aten_flash(library, q, k, v, lengths: Lengths, softmax_scale, causal):
    function, _ = flash.found(library)
    cu_q, cu_k, max_q, max_k = lengths
    if k.shape[1] != q.shape[1]:  # one row of grouped queries is a path of its own, which knows no sample without rows
        max_q = max(2, max_q)
    q, k, v = (_dense_heads(x) for x in (q, k, v))
    return function(q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=softmax_scale)[0]


def _aten_efficient(library, q, k, v, lengths: Lengths, softmax_scale, causal):
    function, _ = flash.found(library)
    cu_q, cu_k, max_q, max_k = lengths
    # One sequence of all rows; longest samples of at least one row and no more than there are, as its backward demands.
    bounds = max(1, min(max_q, q.shape[0])), max(1, min(max_k, k.shape[0]))
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    q, k, v = (_aligned(x)[None] for x in (q, k, v))
    return function(q, k, v, None, cu_q, cu_k, *bounds, 0.0, int(causal), gradients, scale=softmax_scale)[0].squeeze(0)


def _triton(library, q, k, v, lengths: Lengths, softmax_scale, causal):
    function, _ = flash.found(library)
    return on_device(function, q, _dense_heads(q), _dense_heads(k), _dense_heads(v), *lengths, softmax_scale)


CALLS: dict[tuple[str, ...], Callable[..., Any]] = {
    flash.KEYWORDS: _flash,
    flash.TORCH_KEYWORDS: _varlen_attn,
    flash.TRITON: _triton,
    flash.ATEN_FLASH: _aten_flash,
    flash.ATEN_EFFICIENT: _aten_efficient,
}


def _dense_heads(x: torch.Tensor) -> torch.Tensor:
    """x with the elements of a head side by side."""
    return x if x.stride(2) == 1 else x.contiguous()


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x with heads that begin at multiples of 16 bytes, as cutlass loads them."""
    steps = (x.stride(0), x.stride(1), x.storage_offset())
    return x if x.stride(2) == 1 and not any(step % (16 // x.element_size()) for step in steps) else x.contiguous()
