"""Chunk plan in plain PyTorch: threshold, tail drop, packing, nearest retained token and its inverse."""

from __future__ import annotations

import math

import torch

from .._plan_input import check_values, forced_cells
from ..chunk_plan import ChunkPlan


def plan_chunks(
    boundary_prob: torch.Tensor,
    grid: tuple[int, ...],
    drop_fraction: float | torch.Tensor = 0.0,
    threshold: float = 0.5,
    nearest: str = "2d",
    capacity: int | None = None,
    max_seqlen: int | None = None,
    keep: torch.Tensor | None = None,
    ban: torch.Tensor | None = None,
    budget: int | None = None,
    budget_per_sample: int | torch.Tensor | None = None,
    exact: bool = False,
) -> ChunkPlan:
    """See `dcdit_kernels.plan_chunks`. Memory: one (L, M_b) distance matrix at a time.

    `exact` promises that all rows of the capacity will be live.
    """
    check_values(boundary_prob, keep, ban, budget, budget_per_sample)
    batch, cells = boundary_prob.shape
    device = boundary_prob.device
    limit = cells if max_seqlen is None else min(cells, max_seqlen)
    prob = boundary_prob.detach()
    budgeted = budget is not None or budget_per_sample is not None
    forced = forced_cells(prob, keep, ban, budgeted)
    free = torch.ones_like(forced) if budgeted else prob > threshold
    candidates = forced | (free if ban is None else free & ~ban)
    if budgeted:
        rows = cells if budget_per_sample is None else budget_per_sample
        wanted = candidates.sum(1).minimum(torch.as_tensor(rows, device=device))
    else:
        wanted = tail_drop(candidates.sum(1), drop_fraction).maximum(forced.sum(1))
    key = torch.where(forced, 2.0, prob)
    mask = largest(key, candidates, wanted.clamp(max=limit)[:, None])
    most = min((rows for rows in (budget, capacity) if rows is not None), default=mask.numel())
    kept = largest(key.view(1, -1), mask.view(1, -1), most).flatten().nonzero().squeeze(1)
    asked = wanted.sum() if budget is None else wanted.sum().clamp(max=budget)
    overflow = (asked - kept.numel()).to(torch.int32)
    live = kept.numel()
    lengths = torch.bincount(kept // cells, minlength=batch)
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=device)
    cu_seqlens[1:] = lengths.cumsum(0)

    if capacity is None:
        exact = True
        capacity, max_seqlen = live, int(lengths.max()) if batch else 0
    else:
        max_seqlen = min(limit, capacity)
    token_index = torch.full((capacity,), -1, dtype=torch.int32, device=device)
    token_index[:live] = kept.to(torch.int32)
    sample_index = torch.full((capacity,), -1, dtype=torch.int32, device=device)
    sample_index[:live] = (kept // cells).to(torch.int32)

    nearest_row = nearest_rows(kept, lengths.tolist(), grid, nearest)
    order = torch.argsort(nearest_row, stable=True)
    unassigned = int((nearest_row < 0).sum())
    member_index = torch.cat([order[unassigned:], order.new_full((unassigned,), -1)])
    counts = torch.bincount(nearest_row[nearest_row >= 0], minlength=capacity)
    member_offsets = torch.zeros(capacity + 1, dtype=torch.int32, device=device)
    member_offsets[1:] = counts.cumsum(0)
    return ChunkPlan.unchecked(
        grid=tuple(grid),
        batch_size=batch,
        capacity=capacity,
        max_seqlen=max_seqlen,
        cu_seqlens=cu_seqlens,
        token_index=token_index,
        sample_index=sample_index,
        nearest=nearest_row.to(torch.int32),
        member_offsets=member_offsets,
        member_index=member_index.to(torch.int32),
        overflow=overflow,
        exact=exact,
    )


def tail_drop(count: torch.Tensor, drop_fraction: float | torch.Tensor) -> torch.Tensor:
    """Boundaries that stay of n_b (B,): n_b - floor(n_b·ρ_b), the product in float32."""
    fraction = torch.as_tensor(drop_fraction, dtype=torch.float32, device=count.device)
    return count - (count.to(torch.float32) * fraction).floor().to(count.dtype)


def largest(key: torch.Tensor, valid: torch.Tensor, keep: torch.Tensor | int) -> torch.Tensor:
    """Of each row's valid cells those with the `keep` largest keys, of equal keys the first, as a mask."""
    order = torch.argsort(torch.where(valid, key, -1.0), dim=1, descending=True, stable=True)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return valid & (torch.empty_like(order).scatter_(1, order, place) < keep)


def nearest_rows(kept: torch.Tensor, lengths: list[int], grid: tuple[int, ...], nearest: str) -> torch.Tensor:
    """Packed row that refills each cell, int64 (B·L,), -1 for none; ties go to the lowest raster index."""
    cells = math.prod(grid)
    cell = torch.arange(cells, device=kept.device)
    shape = (cells,) if nearest == "1d" else grid
    place = torch.stack(torch.unravel_index(cell, shape), dim=1)
    rows, start = [], 0
    for sample, length in enumerate(lengths):
        own = kept[start : start + length] - sample * cells
        if length == 0:
            rows.append(cell.new_full((cells,), -1))
        elif nearest == "previous":
            row = torch.searchsorted(own, cell, right=True) - 1
            rows.append(torch.where(row >= 0, row + start, -1))
        else:
            distance = sum((place[:, None, axis] - place[own, axis]) ** 2 for axis in range(place.shape[1]))
            # Unique keys, distance first and row second, make the tie rule explicit.
            rows.append(start + (distance * length + torch.arange(length, device=kept.device)).argmin(1))
        start += length
    return torch.cat(rows) if rows else cell.new_empty(0)
