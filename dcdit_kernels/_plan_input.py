"""Inputs of plan_chunks: masks, ρ and budgets, the cells that they force, and refusals."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch

from ._check import SIZES, require, shaped


class NaNError(ValueError):
    """Probabilities that are NaN: the numbers before them ran away."""


def check_masks(prob: torch.Tensor, **masks: torch.Tensor | None) -> None:
    """Each mask must be bool (B, L), where boundary_prob is."""
    for name, mask in masks.items():
        if mask is not None:
            shaped("plan_chunks", name, mask, *prob.shape)
            if mask.dtype != torch.bool:
                raise TypeError(f"plan_chunks: {name} must be bool, got {mask.dtype}")
            devices = prob.device, mask.device
            require(
                devices[0] == devices[1], "plan_chunks: {} must be on {}, as boundary_prob is, got {}", name, *devices
            )


def check_budget(prob: torch.Tensor, drop_fraction: Any, budget: Any, budget_per_sample: Any, look: bool) -> None:
    """Raise unless at most one of the three is asked for, and that well. `look`: at a tensor's values, on a CPU."""
    batch, cells = prob.shape
    if budget is not None or budget_per_sample is not None:
        dropped = isinstance(drop_fraction, torch.Tensor) or drop_fraction != 0
        asked = {
            "drop_fraction": dropped,
            "budget": budget is not None,
            "budget_per_sample": budget_per_sample is not None,
        }
        names = " and ".join(name for name, given in asked.items() if given)
        one = sum(asked.values()) == 1
        require(one, "plan_chunks: drop_fraction, budget and budget_per_sample exclude each other, got {}", names)
        if isinstance(budget_per_sample, torch.Tensor):
            if budget_per_sample.dim() > 0:
                shaped("plan_chunks", "budget_per_sample", budget_per_sample, batch)
            if budget_per_sample.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"plan_chunks: budget_per_sample must be int32 or int64, got {budget_per_sample.dtype}")
        elif budget_per_sample is not None:
            _whole("budget_per_sample", budget_per_sample, cells, "cells of a sample")
        else:
            _whole("budget", budget, batch * cells, "cells of the batch")
    elif isinstance(drop_fraction, torch.Tensor):
        if drop_fraction.dim() > 0:
            shaped("plan_chunks", "drop_fraction", drop_fraction, batch)
        if drop_fraction.device.type == "cpu" and look:  # on a GPU this look would be a synchronisation
            bad = drop_fraction[~((drop_fraction >= 0) & (drop_fraction < 1))].tolist()
            require(not bad, "plan_chunks: drop_fraction must be in [0, 1), got {}", *bad[:1])
    else:
        fits = isinstance(drop_fraction, (float, Real))
        require(fits, "plan_chunks: drop_fraction must be a number or a tensor, got {!r}", drop_fraction)
        require(0 <= drop_fraction < 1, "plan_chunks: drop_fraction must be in [0, 1), got {}", drop_fraction)


def _whole(name: str, value: Any, most: int, of: str) -> None:
    fits = isinstance(value, SIZES) and not isinstance(value, bool)
    require(fits, "plan_chunks: {} must be an integer, got {!r}", name, value)
    require(0 <= value <= most, "plan_chunks: {} must be from 0 to all {} {}, got {}", name, most, of, value)


def rows_of_budget(
    prob: torch.Tensor,
    capacity: int | None,
    max_seqlen: int | None,
    ban: torch.Tensor | None,
    budget: int | None,
    budget_per_sample: int | torch.Tensor | None,
) -> tuple[bool, int | None, int | None]:
    """(whether every row will be live, capacity, max_seqlen), where a budget that is a number tells them."""
    exact = capacity is None and max_seqlen is None and ban is None
    if budget is not None:
        rows = budget
    elif budget_per_sample is None or isinstance(budget_per_sample, torch.Tensor):
        return capacity is None, capacity, max_seqlen
    else:
        rows = prob.shape[0] * budget_per_sample
        max_seqlen = budget_per_sample if max_seqlen is None else min(max_seqlen, budget_per_sample)
    return exact, rows if capacity is None else capacity, max_seqlen


def forced_cells(
    prob: torch.Tensor, keep: torch.Tensor | None, ban: torch.Tensor | None, budgeted: bool
) -> torch.Tensor:
    """The cells that stay whatever else does, bool (B, L): kept ones and, under a budget, a sample's first and last
    where their p is 1, as a router forces them."""
    forced = torch.zeros_like(prob, dtype=torch.bool) if keep is None else keep
    if budgeted:
        ends = torch.zeros_like(forced)
        ends[:, :1] = ends[:, -1:] = True
        forced = forced | (ends & (prob >= 1))
    return forced if ban is None else forced & ~ban


def check_values(
    prob: torch.Tensor,
    keep: torch.Tensor | None,
    ban: torch.Tensor | None,
    budget: int | None = None,
    budget_per_sample: int | torch.Tensor | None = None,
) -> None:
    """Raise ValueError for values that do not fit, NaNError where a number is none; looks at all values.

    A cell (B, L) may not be both kept and banned; the number of one that is not banned must be in [0, 1]; a budget must
    have room for the forced cells, and a sample must have as many cells as its budget (B,).
    """
    if ban is not None:
        if keep is not None and (keep & ban).any():
            raise ValueError(f"plan_chunks: a cell must be kept or banned, got both in {_first(keep & ban)}")
        prob = torch.where(ban, 0.0, prob)
    missing, proper = prob.isnan(), (prob >= 0) & (prob <= 1)
    if missing.any():
        count = int(missing.sum())
        raise NaNError(f"plan_chunks: boundary_prob has {count} NaN, the first in {_first(missing)}")
    if not proper.all():
        value = f"{prob[~proper][0].item()} in {_first(~proper)}"
        raise ValueError(f"plan_chunks: boundary_prob must be in [0, 1], got {value}")
    if budget is None and budget_per_sample is None:
        return
    forced = forced_cells(prob, keep, ban, True).sum(1)
    if budget is not None and budget < forced.sum():
        raise ValueError(f"plan_chunks: budget must be at least the {int(forced.sum())} forced cells, got {budget}")
    if budget_per_sample is not None:
        rows = torch.as_tensor(budget_per_sample, device=prob.device).expand(len(prob))
        for sample, (least, have) in enumerate(zip(forced.tolist(), rows.tolist(), strict=True)):
            if not least <= have <= prob.shape[1]:
                bounds = f"from the {least} forced cells of sample {sample} to all {prob.shape[1]}"
                raise ValueError(f"plan_chunks: budget_per_sample must be {bounds}, got {have}")


def _first(where: torch.Tensor) -> str:
    sample, cell = divmod(int(where.flatten().int().argmax()), where.shape[1])
    return f"sample {sample} at cell {cell}"
