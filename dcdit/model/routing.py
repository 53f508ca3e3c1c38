"""Routing: a router's decision for a batch, and the way of its cells to packed tokens and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

from dcdit_kernels import ChunkPlan, chunk, dechunk, plan_chunks


@dataclass(frozen=True)
class Routing:
    """A router's decision.

    - `boundary_prob` (B, L), float32 or float64: of each cell, the probability that it starts a chunk; that of the
      plan's first B samples where the batch holds further ones.
    - `plan`: the ChunkPlan made of it.
    """

    boundary_prob: torch.Tensor
    plan: ChunkPlan

    @classmethod
    def of(
        cls,
        boundary_prob: torch.Tensor,
        grid: tuple[int, ...],
        drop_fraction: float | torch.Tensor = 0.0,
        **options: Any,
    ) -> Routing:
        """The routing of boundary_prob (B, L) on a grid of L cells; `options` are `plan_chunks`'s."""
        return cls(boundary_prob, plan_chunks(boundary_prob, grid, drop_fraction, nearest=f"{len(grid)}d", **options))

    @property
    def natural_mask(self) -> torch.Tensor:
        """The router's boundaries before the tail drop, bool (B, L)."""
        return self.boundary_prob > 0.5

    @property
    def boundary_mask(self) -> torch.Tensor:
        """The retained cells, bool (B, L)."""
        return self.plan.boundary_mask[: len(self.boundary_prob)]

    @property
    def valid(self) -> None:
        """Every cell is a sample's own, unlike those of a MixedRouting."""

    @property
    def kept(self) -> torch.Tensor:
        """The share of each sample's cells that is retained, float32 (B,)."""
        return self.plan.lengths[: len(self.boundary_prob)] / self.plan.cells

    def chunk(self, h: torch.Tensor, pos_embed: torch.Tensor | None = None, reduce: str = "own") -> torch.Tensor:
        """The retained cells of h (B, L, D), or with "mean" their segments' means, each with its row of pos_embed
        (L, D): packed tokens (capacity, D)."""
        return chunk(h, self.plan, pos_embed, reduce)

    def dechunk(self, tokens: torch.Tensor, residual: torch.Tensor, sigma: float | None) -> torch.Tensor:
        """Tokens (capacity, D) smoothed over `sigma` cells (None: not), put back on the grid and added to
        residual (B, L, D)."""
        if sigma is None:
            return dechunk(tokens, self.boundary_prob, self.plan, residual, smoothing=None)
        return dechunk(tokens, self.boundary_prob, self.plan, residual, sigma)

    def check(self, batch: int, grid: tuple[int, ...], budget: dict[str, Any]) -> None:
        """Raise ValueError unless this routing can serve `batch` samples of `grid` in place of a router's.

        `budget` holds a call's drop_fraction, capacity and the like; it must be empty.
        """
        if budget:
            names = " and ".join(budget)
            raise ValueError(f"{names} must be left out beside a routing, which has its own budget")
        plan = self.plan
        if plan.grid != grid or not len(self.boundary_prob) == plan.batch_size == batch:
            samples = f"{len(self.boundary_prob)} of {plan.batch_size} samples"
            raise ValueError(f"routing must be for {batch} samples of {grid} cells, got {samples} of {plan.grid} cells")


def route(
    router: Callable[..., torch.Tensor], h: torch.Tensor, *args: Any, grid: tuple[int, ...], **options: Any
) -> Routing:
    """Ask router(h, *args) for boundary_prob (B, L) of h (B, L, D), and plan by it; `options` as in `Routing.of`.

    The router sees h in float32 at least and never autocast, as the method wants it. Raises ValueError where h does not
    fit the grid, or the router's answer does not fit h.
    """
    if h.dim() != 3 or h.shape[1] != math.prod(grid):
        raise ValueError(f"h must have shape (B, {math.prod(grid)}, D) for grid {grid}, got {tuple(h.shape)}")
    with torch.autocast(h.device.type, enabled=False):
        boundary_prob = router(h.to(torch.promote_types(h.dtype, torch.float32)), *args)
    if boundary_prob.shape != h.shape[:2]:
        shapes = f"{tuple(h.shape[:2])}, got {tuple(boundary_prob.shape)}"
        raise ValueError(f"router must return boundary_prob of shape {shapes}")
    return Routing.of(boundary_prob, grid, **options)


def rows_known(options: dict[str, Any]) -> bool:
    """Whether these of `plan_chunks`'s options say how many rows there will be, so that the host waits for no GPU."""
    return any(isinstance(options.get(name), Integral) for name in ("capacity", "budget", "budget_per_sample"))


def regular_cells(grid: tuple[int, ...], stride: int, device: torch.device) -> torch.Tensor:
    """Every `stride`-th cell along each axis of the grid, the first among them: bool (L,)."""
    cells = torch.ones((), dtype=torch.bool, device=device)
    for side in grid:
        cells = cells[..., None] & (torch.arange(side, device=device) % stride == 0)
    return cells.flatten()


def least_tokens(grid: tuple[int, ...], keep_grid: int) -> int:
    """The cells that a sample keeps under any budget: the first, the last, and those of `keep_grid`."""
    forced = (
        regular_cells(grid, keep_grid, torch.device("cpu"))
        if keep_grid
        else torch.zeros(math.prod(grid), dtype=torch.bool)
    )
    forced[0] = forced[-1] = True
    return int(forced.sum())
