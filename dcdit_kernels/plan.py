"""plan_chunks: from boundary probabilities to the ChunkPlan that every other operator takes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real

import torch

from . import _library, extension
from ._check import SIZES, dense, floating, require, shaped, traced
from ._ops import Backend, Operator
from ._plan_input import check_budget, check_masks, rows_of_budget
from .chunk_plan import ChunkPlan
from .packing import kept_for_backward

NEAREST = ("2d", "3d", "1d", "previous")

OPERATOR = Operator("plan_chunks", native=Backend("dcdit_kernels.extension:plan_chunks", extension.why_not))


def plan_chunks(
    boundary_prob: torch.Tensor,
    grid: tuple[int, ...],
    drop_fraction: float | torch.Tensor = 0.0,
    threshold: float = 0.5,
    nearest: str = "2d",
    capacity: int | None = None,
    valid: torch.Tensor | None = None,
    *,
    max_seqlen: int | None = None,
    keep: torch.Tensor | None = None,
    ban: torch.Tensor | None = None,
    budget: int | None = None,
    budget_per_sample: int | torch.Tensor | None = None,
    backend: str | None = None,
) -> ChunkPlan:
    """Decide which cells stay, pack them, and find who refills whom (arXiv 2603.06351 section 3).

    A cell is a boundary where p > threshold, strictly. Of each sample's n_b boundaries the floor(n_b·ρ_b) of
    lowest p are dropped (product in float32; of equal p the later cell goes first).

    Args:
        boundary_prob: (B, L) floating point, in [0, 1].
        grid: (H, W), (F, H, W) or (L,), with L cells in raster order.
        drop_fraction: ρ in [0, 1), one number or a tensor () or (B,). Under torch.compile a number is compiled in;
            pass a tensor to vary it.
        nearest: who refills a cell: "2d" / "3d" the retained cell at the least Euclidean distance on the grid,
            ties to the lowest raster index; "1d" the least |i - j|, ties to the left; "previous" the last
            retained cell at or before it.
        capacity: rows of every packed tensor. None: exactly the retained tokens, at the price of one
            device-to-host copy. A number: no synchronisation; what has no room is the least probable of the whole
            batch, counted in `ChunkPlan.overflow`.
        valid: bool (B, L), False at padded cells. Those are no boundaries, whatever their probability, and are
            refilled as other cells are.
        max_seqlen: rows that a sample takes at most, for attention's launches under a fixed capacity: without it they
            are as many as if one sample had all rows. Where a sample has more boundaries, those of lowest p are
            dropped and counted in `ChunkPlan.overflow`.
        keep: bool (B, L), True at cells that are boundaries whatever their probability. The drop spares them; as rows
            past `max_seqlen` they are the last to go, the later first.
        ban: bool (B, L), True at cells that are none. A cell may not be both kept and banned, nor kept and padded;
            where nobody looks (on a GPU with a fixed capacity, under torch.compile) it is banned.
        budget: in place of ρ and threshold, the most probable cells of the batch, so many of them, whichever their
            samples; of equal p the earlier. Forced cells come first: those of `keep`, and each sample's first and last
            where their p is 1. Without a capacity there are so many rows and no synchronisation.
        budget_per_sample: likewise the most probable cells of each sample: one number, or integers () or (B,). A
            number needs no synchronisation either.

    Raises ValueError for a wrong shape, grid, ρ, budget, threshold, mask or probability (on a GPU with a fixed
    number of rows probabilities, masks and tensors of budgets are not looked at), TypeError for a wrong dtype,
    BackendError where `backend` cannot run.
    """
    require(isinstance(grid, Iterable), "plan_chunks: grid must be (L,), (H, W) or (F, H, W), got {!r}", grid)
    grid = tuple(grid)
    require(nearest in NEAREST, "plan_chunks: nearest must be one of {}, got {!r}", NEAREST, nearest)
    fits = len(grid) in (1, 2, 3) and all([isinstance(n, SIZES) and n >= 1 for n in grid])
    require(fits, "plan_chunks: grid must be (L,), (H, W) or (F, H, W), got {!r}", grid)
    if nearest in ("2d", "3d"):
        fits = len(grid) == int(nearest[0])
        require(fits, "plan_chunks: nearest={!r} needs a {} grid, got {!r}", nearest, nearest, grid)
    floating("plan_chunks", boundary_prob=boundary_prob)
    shaped("plan_chunks", "boundary_prob", boundary_prob, None, math.prod(grid))
    fits = isinstance(threshold, (float, Real)) and 0 <= threshold <= 1
    require(fits, "plan_chunks: threshold must be in [0, 1], got {!r}", threshold)
    check_masks(boundary_prob, valid=valid, keep=keep, ban=ban)
    if valid is not None:
        ban = ~valid if ban is None else ban | ~valid
    for name, rows in (("capacity", capacity), ("max_seqlen", max_seqlen)):
        fits = rows is None or (isinstance(rows, int) and 0 <= rows < 2**31)
        fits = fits or (isinstance(rows, torch.SymInt) and rows >= 0)
        require(fits, "plan_chunks: {} must be a number of rows, 0 or more, got {!r}", name, rows)
    compiling = traced(boundary_prob)
    if not compiling:
        dense("plan_chunks", boundary_prob=boundary_prob)
    budgets = budget, budget_per_sample
    check_budget(boundary_prob, drop_fraction, *budgets, look=not compiling)
    exact, capacity, max_seqlen = rows_of_budget(boundary_prob, capacity, max_seqlen, ban, *budgets)
    if not compiling:
        count = boundary_prob.numel()
        require(count < 2**31, "plan_chunks: cells are counted in int32, got {} of them", count)
        with kept_for_backward():
            args = boundary_prob, grid, drop_fraction, threshold, nearest, capacity, max_seqlen, keep, ban, *budgets
            return OPERATOR.run(backend, *args, exact)
    if not isinstance(drop_fraction, torch.Tensor):  # a number would be compiled in, each number anew
        drop_fraction = torch.full((), drop_fraction, dtype=torch.float32, device=boundary_prob.device)
    if budget_per_sample is not None and not isinstance(budget_per_sample, torch.Tensor):
        budget_per_sample = torch.full((), budget_per_sample, dtype=torch.int32, device=boundary_prob.device)
    options = threshold, nearest, capacity, max_seqlen, keep, ban, budget, budget_per_sample, backend
    tensors = torch.ops.dcdit.plan_chunks(boundary_prob, drop_fraction, grid, *options)
    parts = dict(zip(_library.PLAN_TENSORS, tensors, strict=True))
    # A graph does not know the longest sample before it runs; max_seqlen may be an upper bound.
    rows = parts["token_index"].shape[0]
    longest = math.prod(grid) if max_seqlen is None else min(math.prod(grid), max_seqlen)
    sizes = {"batch_size": boundary_prob.shape[0], "capacity": rows, "max_seqlen": longest}
    return ChunkPlan.unchecked(grid=grid, **sizes, **parts, exact=exact)


def _plan_tensors(prob, drop_fraction, grid, *options):
    *options, backend = options
    plan = OPERATOR.run(backend, prob.detach(), tuple(grid), drop_fraction, *options)
    return [getattr(plan, part) for part in _library.PLAN_TENSORS]


def _plan_fake(prob, drop_fraction, grid, threshold, nearest, capacity, *_):
    batch, cells = prob.shape
    rows = torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity
    shapes = {
        "cu_seqlens": (batch + 1,),
        "token_index": (rows,),
        "sample_index": (rows,),
        "nearest": (batch * cells,),
        "member_offsets": (rows + 1,),
        "member_index": (batch * cells,),
        "overflow": (),
    }
    return [prob.new_empty(shapes[part], dtype=torch.int32) for part in _library.PLAN_TENSORS]


_library.implement(
    "plan_chunks(Tensor boundary_prob, Tensor drop_fraction, int[] grid, float threshold, str nearest, "
    "SymInt? capacity, SymInt? max_seqlen, Tensor? keep, Tensor? ban, "
    "SymInt? budget, Tensor? budget_per_sample, str? backend) -> Tensor[]",
    _plan_tensors,
    _plan_fake,
)
