"""Boundary scores: the probability that a cell starts a new chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import _triton_support
from ._check import SIZES, all_tensors, grouped, not_negative, offsets, require, shaped
from ._ops import Backend, Differentiable
from .cpu import _rows


def _score_of(x: torch.Tensor, *shape: int) -> torch.Tensor:
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _fake_predictability(features: torch.Tensor, **_: Any) -> torch.Tensor:
    batch, _channels, height, width = features.shape
    return _score_of(features, batch, height * width)


BOUNDARY_COSINE = Differentiable(
    "boundary_cosine",
    "Tensor q, Tensor k, Tensor? kernel, Tensor? cu_seqlens",
    "SymInt[]? grid",
    lambda q, k, **_: _score_of(q if q.dtype == torch.float64 else k, *q.shape[:-1]),
    plan=False,
    integers=("cu_seqlens",),
    native=Backend("dcdit_kernels.cpu.boundary:boundary_cosine", _rows.why_not),
    triton=Backend("dcdit_kernels.triton.boundary_cosine:BoundaryCosine", _triton_support.why_not),
)
BOUNDARY_PREDICTABILITY = Differentiable(
    "boundary_predictability",
    "Tensor features, Tensor norm_weight, Tensor norm_bias, Tensor score_weight, Tensor score_bias",
    "int groups, float eps",
    _fake_predictability,
    plan=False,
    triton=Backend("dcdit_kernels.triton.boundary_predictability:BoundaryPredictability", _triton_support.why_not),
)


def boundary_cosine(
    q: torch.Tensor,
    k: torch.Tensor,
    kernel: torch.Tensor | None = None,
    grid: tuple[int, int] | None = None,
    cu_seqlens: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Dissimilarity to the neighbourhood, p = clamp((1 - q·k') / 2, 0, 1), q and k l2-normalised, ends forced to 1.

    1D (H-Net, arXiv 2507.07955 eq. 4): k' is the previous cell's k. 2D (arXiv 2603.06351 v1): k' is the depthwise
    3×3 average of k with zero padding, weighted by `kernel`.

    Args:
        q, k: (B, L, D), or (T, D) with `cu_seqlens` (1D only).
        kernel: (D, 3, 3) neighbourhood weights; given, the score is 2D and `grid` (H, W) with H·W = L is needed.
        cu_seqlens: int32 (B + 1,) of packed samples.

    Returns p in float32 (float64 for float64 input), (B, L) or (T,); 0 past the last live row. The forced first
    and last cell of each sample pass no gradient. Raises ValueError where the shapes or, on a CPU, the offsets do not
    fit.
    """
    try:
        alike, axes = q.shape == k.shape, q.dim()
        if cu_seqlens is not None:
            offsets("boundary_cosine", "cu_seqlens", cu_seqlens, q.shape[0])
    except (AttributeError, RuntimeError):
        all_tensors("boundary_cosine", q=q, k=k, **({} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}))
        raise
    require(alike, "boundary_cosine: q and k must have one shape, got {}, {}", tuple(q.shape), tuple(k.shape))
    wanted = "(B, L, D)" if cu_seqlens is None else "(T, D) with cu_seqlens"
    require(axes == (3 if cu_seqlens is None else 2), "boundary_cosine: q must be {}, got {}", wanted, tuple(q.shape))
    if kernel is not None:
        if cu_seqlens is not None or not isinstance(grid, Sequence):
            raise ValueError(f"boundary_cosine: kernel needs grid=(H, W) and dense q, k, got grid={grid}")
        shaped("boundary_cosine", "kernel", kernel, q.shape[-1], 3, 3)
        sides = len(grid) == 2 and all([isinstance(n, SIZES) and n >= 1 for n in grid])
        fits = sides and grid[0] * grid[1] == q.shape[1]
        require(fits, "boundary_cosine: grid must be (H, W) with H·W = L = {}, got {!r}", q.shape[1], grid)
    return BOUNDARY_COSINE(backend, q=q, k=k, kernel=kernel, cu_seqlens=cu_seqlens, grid=grid)


def boundary_predictability(
    features: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    score_weight: torch.Tensor,
    score_bias: torch.Tensor,
    groups: int = 8,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """p = sigmoid(w · SiLU(GroupNorm(features)) + b), ends forced to 1 (arXiv 2603.06351 v2).

    Everything of the predictability router after its last 3×3 convolution.

    Args:
        features: (B, C, H, W), output of that convolution.
        norm_weight, norm_bias: (C,) of the GroupNorm with `groups` groups.
        score_weight: (C,), score_bias: (1,) or (): the final 1×1 convolution.

    Returns p (B, H·W) in float32 (float64 for float64 input). The forced first and last cell pass no gradient.
    """
    vectors = {"norm_weight": norm_weight, "norm_bias": norm_bias, "score_weight": score_weight}
    shaped("boundary_predictability", "features", features, None, None, None, None)
    channels = features.shape[1]
    for name, tensor in vectors.items():
        shaped("boundary_predictability", name, tensor, channels)
    try:
        one, shape = score_bias.numel() == 1, score_bias.shape
    except (AttributeError, RuntimeError):
        all_tensors("boundary_predictability", score_bias=score_bias)
        raise
    require(one, "boundary_predictability: score_bias must hold one number, got {}", shape)
    grouped("boundary_predictability", channels, groups)
    not_negative("boundary_predictability", "eps", eps)
    return BOUNDARY_PREDICTABILITY(
        backend,
        features=features,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        score_weight=score_weight,
        score_bias=score_bias,
        groups=groups,
        eps=eps,
    )
