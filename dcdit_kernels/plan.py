"""plan_chunks: from boundary probabilities to the ChunkPlan that every other operator takes."""

from __future__ import annotations

import math

import torch

from . import _dispatch, native
from ._check import floating, require, shaped
from .chunk_plan import ChunkPlan

NEAREST = ("2d", "3d", "1d", "previous")

_dispatch.register_reference("plan_chunks")
_dispatch.register("plan_chunks", "native", "dcdit_kernels.native:plan_chunks", native.plan_why_not)


def plan_chunks(
    boundary_prob: torch.Tensor,
    grid: tuple[int, ...],
    drop_fraction: float | torch.Tensor = 0.0,
    threshold: float = 0.5,
    nearest: str = "2d",
    capacity: int | None = None,
    *,
    backend: str | None = None,
) -> ChunkPlan:
    """Decide which cells stay, pack them, and find who refills whom (arXiv 2603.06351 section 3).

    A cell is a boundary where p > threshold, strictly. Of each sample's n_b boundaries the floor(n_b·ρ_b) of
    lowest p are dropped (product in float32; of equal p the later cell goes first).

    Args:
        boundary_prob: (B, L) floating point, without NaN.
        grid: (H, W), (F, H, W) or (L,), with L cells in raster order.
        drop_fraction: ρ in [0, 1), one number or a tensor (B,).
        nearest: who refills a cell: "2d" / "3d" the retained cell at the least Euclidean distance on the grid,
            ties to the lowest raster index; "1d" the least |i - j|, ties to the left; "previous" the last
            retained cell at or before it.
        capacity: rows of every packed tensor. None: exactly the retained tokens, at the price of one
            device-to-host copy. A number: no synchronisation; see `ChunkPlan.overflow`.

    Raises ValueError for a wrong shape, grid, ρ or probability, BackendError where `backend` cannot run.
    """
    grid = tuple(grid)
    require(nearest in NEAREST, f"plan_chunks: nearest must be one of {NEAREST}, got {nearest!r}")
    require(
        len(grid) in (1, 2, 3) and min(grid) >= 1,
        f"plan_chunks: grid must be (L,), (H, W) or (F, H, W), got {grid}",
    )
    if nearest in ("2d", "3d"):
        require(
            len(grid) == int(nearest[0]),
            f"plan_chunks: nearest={nearest!r} needs a {nearest} grid, got {grid}",
        )
    floating("plan_chunks", boundary_prob=boundary_prob)
    shaped("plan_chunks", "boundary_prob", boundary_prob, None, math.prod(grid))
    if isinstance(drop_fraction, torch.Tensor):
        if drop_fraction.dim() > 0:
            shaped("plan_chunks", "drop_fraction", drop_fraction, boundary_prob.shape[0])
        # On a GPU the check would be a synchronisation.
        fraction = drop_fraction.tolist() if drop_fraction.device.type == "cpu" else []
    else:
        fraction = drop_fraction
    for rho in fraction if isinstance(fraction, list) else [fraction]:
        require(0 <= rho < 1, f"plan_chunks: drop_fraction must be in [0, 1), got {rho}")
    require(capacity is None or capacity >= 0, f"plan_chunks: capacity must not be negative, got {capacity}")
    return _dispatch.run("plan_chunks", backend, boundary_prob, grid, drop_fraction, threshold, nearest, capacity)
