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
    drop = (count.float() * torch.as_tensor(drop_fraction, dtype=torch.float32, device=prob.device)).floor().long()
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


def pad_rows(rows: torch.Tensor, padded: PaddedPlan) -> torch.Tensor:
    """Packed rows (T, …) → (B, M, …), zero where there is none."""
    out = rows.new_zeros(*padded.valid.shape, *rows.shape[1:])
    return out.index_put(padded.valid.nonzero(as_tuple=True), rows)
