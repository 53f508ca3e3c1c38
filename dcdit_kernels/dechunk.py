"""dechunk: refill the grid from the packed tokens."""

from __future__ import annotations

import math
from numbers import Real

import torch

from . import _triton_support
from ._check import CHUNK_PLAN, no_plan, packed, require, shaped
from ._ops import Backend, Differentiable
from .chunk_plan import ChunkPlan
from .cpu import _rows

SMOOTHING = ("gaussian", "ema", None)

OPERATOR = Differentiable(
    "dechunk",
    "Tensor x, Tensor boundary_prob, Tensor? residual",
    "float sigma, str? smoothing",
    lambda x, plan, **_: x.new_empty(plan.batch_size, plan.cells, x.shape[1]),
    unread=("residual",),
    native=Backend("dcdit_kernels.cpu.dechunk:dechunk", _rows.why_not),
    triton=Backend("dcdit_kernels.triton.dechunk:Dechunk", _triton_support.why_not),
)


def dechunk(
    x: torch.Tensor,
    boundary_prob: torch.Tensor,
    plan: ChunkPlan,
    residual: torch.Tensor | None = None,
    sigma: float = 1.0,
    smoothing: str | None = "gaussian",
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """y = plugged · STE(s) + residual, plugged cells taking the smoothed row of their nearest retained token.

    gaussian: out_i = p̃_i x_i + (1 - p̃_i) Σ_j w_ij x_j / (Σ_j w_ij + 1e-8) over the sample's retained tokens j, with
    w_ij = p̃_j exp(-|u_i - u_j|² / 2σ²), u the cell on the grid and p̃ = clamp(p, 1e-4, 1 - 1e-4).
    ema: `ema_smooth`. None: no smoothing. STE(s) is 1 forward and passes Σ_D (∂y · plugged) on to s = max(p, 1 - p).

    Args:
        x: (capacity, D) packed features. boundary_prob: (B, L). residual: (B, L, D) or None.
        sigma: width of the Gaussian, in cells.

    Returns (B, L, D) in x's dtype, accumulated in float32; a cell that no token refills gets the residual alone.
    Raises ValueError where the shapes do not fit. Source: arXiv 2603.06351 section 3.
    """
    try:
        cells = plan.cells
    except AttributeError:
        raise no_plan("dechunk", plan, CHUNK_PLAN) from None
    packed("dechunk", "x", x, plan)
    shaped("dechunk", "boundary_prob", boundary_prob, plan.batch_size, cells)
    if residual is not None:
        shaped("dechunk", "residual", residual, plan.batch_size, cells, x.shape[1])
    require(smoothing in SMOOTHING, "dechunk: smoothing must be one of {}, got {!r}", SMOOTHING, smoothing)
    fits = isinstance(sigma, (float, Real, torch.Tensor)) and 0 < sigma < math.inf
    require(fits, "dechunk: sigma must be positive and finite, got {!r}", sigma)
    inputs = {"x": x, "boundary_prob": boundary_prob, "residual": residual}
    return OPERATOR(backend, **inputs, plan=plan, sigma=sigma, smoothing=smoothing)
