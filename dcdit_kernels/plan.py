"""plan_chunks: from boundary probabilities to the ChunkPlan that every other operator takes."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch

from . import _library, native
from ._check import floating, require, shaped, traced
from ._ops import Backend, Operator
from .chunk_plan import ChunkPlan
from .packing import kept_for_backward

SIZES = (int, torch.SymInt, Integral)  # cheapest first
NEAREST = ("2d", "3d", "1d", "previous")

OPERATOR = Operator("plan_chunks", native=Backend("dcdit_kernels.native:plan_chunks", native.why_not))


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
            device-to-host copy. A number: no synchronisation; see `ChunkPlan.overflow`.
        valid: bool (B, L), False at padded cells. Those are no boundaries, whatever their probability, and are
            refilled as other cells are.
        max_seqlen: rows that a sample takes at most, for attention's launches under a fixed capacity: without it they
            are as many as if one sample had all rows. Where a sample has more boundaries, those of lowest p are
            dropped and counted in `ChunkPlan.overflow`.
        keep: bool (B, L), True at cells that are boundaries whatever their probability. The drop spares them; as rows
            past `max_seqlen` they are the last to go, the later first.
        ban: bool (B, L), True at cells that are none. A cell may not be both kept and banned, nor kept and padded;
            where nobody looks (on a GPU with a fixed capacity, under torch.compile) it is banned.

    Raises ValueError for a wrong shape, grid, ρ, threshold, mask or probability (on a GPU with a fixed
    capacity probabilities and masks are not looked at), TypeError for a wrong dtype, BackendError where `backend`
    cannot run.
    """
    grid = tuple(grid)
    require(nearest in NEAREST, "plan_chunks: nearest must be one of {}, got {!r}", NEAREST, nearest)
    fits = len(grid) in (1, 2, 3) and all([isinstance(n, SIZES) and n >= 1 for n in grid])
    require(fits, "plan_chunks: grid must be (L,), (H, W) or (F, H, W), got {}", grid)
    if nearest in ("2d", "3d"):
        fits = len(grid) == int(nearest[0])
        require(fits, "plan_chunks: nearest={!r} needs a {} grid, got {}", nearest, nearest, grid)
    floating("plan_chunks", boundary_prob=boundary_prob)
    shaped("plan_chunks", "boundary_prob", boundary_prob, None, math.prod(grid))
    fits = isinstance(threshold, (float, Real)) and 0 <= threshold <= 1
    require(fits, "plan_chunks: threshold must be in [0, 1], got {}", threshold)
    for name, mask in (("valid", valid), ("keep", keep), ("ban", ban)):
        if mask is not None:
            shaped("plan_chunks", name, mask, *boundary_prob.shape)
            if mask.dtype != torch.bool:
                raise TypeError(f"plan_chunks: {name} must be bool, got {mask.dtype}")
            require(mask.device == boundary_prob.device, "plan_chunks: {} must be on {}, as boundary_prob is, got {}",
                    name, boundary_prob.device, mask.device)  # fmt: skip
    if valid is not None:
        ban = ~valid if ban is None else ban | ~valid
    for name, rows in (("capacity", capacity), ("max_seqlen", max_seqlen)):
        fits = rows is None or (isinstance(rows, int | torch.SymInt) and rows >= 0)
        require(fits, "plan_chunks: {} must be a number of rows, 0 or more, got {!r}", name, rows)
    compiling = traced(boundary_prob)
    if isinstance(drop_fraction, torch.Tensor):
        if drop_fraction.dim() > 0:
            shaped("plan_chunks", "drop_fraction", drop_fraction, boundary_prob.shape[0])
        if drop_fraction.device.type == "cpu" and not compiling:  # on a GPU this look would be a synchronisation
            bad = drop_fraction[~((drop_fraction >= 0) & (drop_fraction < 1))].tolist()
            require(not bad, "plan_chunks: drop_fraction must be in [0, 1), got {}", *bad[:1])
    else:
        fits = isinstance(drop_fraction, (float, Real))
        require(fits, "plan_chunks: drop_fraction must be a number or a tensor, got {!r}", drop_fraction)
        require(0 <= drop_fraction < 1, "plan_chunks: drop_fraction must be in [0, 1), got {}", drop_fraction)
    if not compiling:
        count = boundary_prob.numel()
        require(count < 2**31, "plan_chunks: cells are counted in int32, got {} of them", count)
        with kept_for_backward():
            args = (boundary_prob, grid, drop_fraction, threshold, nearest, capacity, max_seqlen, keep, ban)
            return OPERATOR.run(backend, *args)
    if not isinstance(drop_fraction, torch.Tensor):  # a number would be compiled in, each of them anew
        drop_fraction = torch.full((), drop_fraction, dtype=torch.float32, device=boundary_prob.device)
    options = threshold, nearest, capacity, max_seqlen, keep, ban, backend
    tensors = torch.ops.dcdit.plan_chunks(boundary_prob, drop_fraction, grid, *options)
    parts = dict(zip(_library.PLAN_TENSORS, tensors, strict=True))
    # A graph does not know the longest sample before it runs; max_seqlen may be an upper bound.
    rows = parts["token_index"].shape[0]
    longest = math.prod(grid) if max_seqlen is None else min(math.prod(grid), max_seqlen)
    sizes = {"batch_size": boundary_prob.shape[0], "capacity": rows, "max_seqlen": longest}
    return ChunkPlan.unchecked(grid=grid, **sizes, **parts, exact=capacity is None)


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
    "SymInt? capacity, SymInt? max_seqlen, Tensor? keep, Tensor? ban, str? backend) -> Tensor[]",
    _plan_tensors,
    _plan_fake,
)
