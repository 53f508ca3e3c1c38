"""The plan by sorting and padding: a double argsort for the drop, an argsort to pack, L×M distances to refill."""

from __future__ import annotations

from typing import NamedTuple

import torch


class PaddedPlan(NamedTuple):
    """`index` int64 (B, M) kept cells of each sample, `valid` bool (B, M), `nearest` int64 (B, L) into M."""

    index: torch.Tensor
    valid: torch.Tensor
    nearest: torch.Tensor


def plan(prob: torch.Tensor, grid: tuple[int, int], drop_fraction: float | torch.Tensor = 0.0) -> PaddedPlan:
    """prob (B, L) → PaddedPlan, M being the most kept cells of any sample."""
    natural = prob > 0.5
    count = natural.sum(1)
    drop = (count.float() * drop_fraction).floor().long()
    rank = torch.where(natural, prob, -1.0).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    keep = natural & (rank < (count - drop)[:, None])
    lengths = keep.sum(1)
    longest = int(lengths.max())
    index = (~keep).byte().argsort(dim=1, stable=True)[:, :longest]
    valid = torch.arange(longest, device=prob.device) < lengths[:, None]

    return PaddedPlan(index, valid, nearest(index, valid, grid))


def nearest(index: torch.Tensor, valid: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Who refills each cell, int64 (B, L) into M, by all distances (B, L, M)."""
    cell = torch.arange(grid[0] * grid[1], device=index.device)
    row, column = (cell // grid[1]).float(), (cell % grid[1]).float()
    distance = (row[:, None] - row[index][:, None]).square() + (column[:, None] - column[index][:, None]).square()
    return distance.masked_fill(~valid[:, None], torch.inf).argmin(2)


def places(padded: PaddedPlan) -> torch.Tensor:
    """Where each packed row stands in the flattened (B, M), int64 (T,). The host waits for T, so once for each plan."""
    return padded.valid.flatten().nonzero().squeeze(1)


def pad_rows(rows: torch.Tensor, valid: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Packed rows (T, …) → (B, M, …), zero where there is none."""
    return rows.new_zeros(valid.numel(), *rows.shape[1:]).index_copy(0, place, rows).unflatten(0, valid.shape)
