"""GroupNorm and SiLU in one pass over channels-last features, with bias and conditioning added in front."""

from __future__ import annotations

from typing import Any

import torch

from . import _triton_support
from ._check import all_tensors, dense, grouped, not_negative, shaped
from ._ops import Backend, Differentiable
from .cpu import _rows


def _like_x(x: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


OPERATOR = Differentiable(
    "group_norm_silu",
    "Tensor x, Tensor weight, Tensor bias, Tensor? cond, Tensor? x_bias",
    "int groups, float eps",
    _like_x,
    plan=False,
    native=Backend("dcdit_kernels.cpu.group_norm:GroupNormSiLU", _rows.why_not),
    triton=Backend("dcdit_kernels.triton.group_norm:GroupNormSiLU", _triton_support.why_not),
)


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    cond: torch.Tensor | None = None,
    x_bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """SiLU(GroupNorm(x + x_bias + cond)), the first half of a residual convolution block (GroupNorm: arXiv 1803.08494).

    Args:
        x: (B, C, H, W). Features that are not channels-last are copied.
        weight, bias: (C,) of the GroupNorm with `groups` groups.
        cond: (B, C), added to every cell of a sample.
        x_bias: (C,), added to every cell: the bias of the convolution that made x, where that left it out.

    Returns (B, C, H, W) in x's dtype, channels-last; sum and statistics in float32 (float64 for float64 input).
    Raises ValueError where shapes or groups do not fit.
    """
    try:
        shape = x.shape
        if len(shape) != 4:
            shaped("group_norm_silu", "x", x, None, None, None, None)
        channels = shape[1:2]
        vectors = (("weight", weight, channels), ("bias", bias, channels), ("cond", cond, shape[:2]))
        for name, tensor, wanted in (*vectors, ("x_bias", x_bias, channels)):
            if tensor is not None and tensor.shape != wanted:
                shaped("group_norm_silu", name, tensor, *wanted)
        grouped("group_norm_silu", shape[1], groups)
        not_negative("group_norm_silu", "eps", eps)
        x = x.contiguous(memory_format=torch.channels_last)
    except (AttributeError, RuntimeError):
        given = {"x": x, "weight": weight, "bias": bias, "cond": cond, "x_bias": x_bias}
        all_tensors("group_norm_silu", **{name: t for name, t in given.items() if t is not None or name == "x"})
        dense("group_norm_silu", x=x)
        raise
    return OPERATOR(backend, x=x, weight=weight, bias=bias, cond=cond, x_bias=x_bias, groups=groups, eps=eps)
