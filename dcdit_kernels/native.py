"""The skin over the compiled `dcdit_kernels._C`: outputs and workspace from torch, addresses and the stream to C++."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch

from ._check import reject_nan
from .chunk_plan import ChunkPlan

try:
    from . import _C  # type: ignore[attr-defined]

    load_error: str | None = None
except ImportError as error:
    _C, load_error = None, str(error)

# The place of a mode is its number in csrc/plan.h.
MODES = ("grid", "1d", "previous")
# Below this many cells a second thread costs more than it saves.
CELLS_PER_THREAD = 16384


def missing(device: torch.device) -> str | None:
    """Reason why the extension cannot run on this device, with what to do; None where it can."""
    if _C is None:
        return f"the extension dcdit_kernels._C is not built ({load_error}); a C++ compiler and `pip install .` build it"
    if device.type == "cuda" and not _C.cuda_archs:
        return "the extension was built without CUDA; put nvcc on PATH and run `pip install .` again"
    if device.type not in ("cpu", "cuda"):
        return f"the extension runs on cpu and cuda, got {device}"
    return None


def plan_why_not(boundary_prob: torch.Tensor, *args: Any, **kwargs: Any) -> str | None:
    """Reason why `plan_chunks` cannot run here, or None."""
    return missing(boundary_prob.device)


def place(device: torch.device, items: int, block: int = 1) -> Any:
    """Where a call runs: the current stream of a GPU, or CPU threads, no more than `items` are worth."""
    if device.type == "cuda":
        return _C.Place(True, torch.cuda.current_stream(device).cuda_stream, 0, 0)
    return _C.Place(False, 0, max(1, min(torch.get_num_threads(), items)), block)


def device_of(tensor: torch.Tensor) -> Any:
    """Guard under which a tensor's GPU is the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@torch.compiler.disable
def plan_chunks(
    boundary_prob: torch.Tensor,
    grid: tuple[int, ...],
    drop_fraction: float | torch.Tensor = 0.0,
    threshold: float = 0.5,
    nearest: str = "2d",
    capacity: int | None = None,
    *,
    block: int = 1,
) -> ChunkPlan:
    """See `dcdit_kernels.plan_chunks`.

    On CUDA three launches, a block per sample; on a CPU threads over samples. Workspace: B·L integers, and at most
    3·B·L more on a GPU (none up to 4096 cells of a 2D grid), 9·L per thread on a CPU. `block` is for tests: threads
    of a sample's block on the CPU, 1 or 64.
    """
    with device_of(boundary_prob):
        return _plan_chunks(boundary_prob.detach(), grid, drop_fraction, threshold, nearest, capacity, block)


def _plan_chunks(boundary_prob, grid, drop_fraction, threshold, nearest, capacity, block):
    (batch, cells), device = boundary_prob.shape, boundary_prob.device
    # Euclidean distance along a single axis is the 1d distance, ties included.
    if nearest in ("2d", "3d"):
        nearest = "grid" if sum(n > 1 for n in grid) > 1 else "1d"
    mode = MODES.index(nearest)
    prob = boundary_prob
    if prob.dtype in (torch.float16, torch.bfloat16):
        threshold = torch.tensor(threshold, dtype=prob.dtype).item()  # PyTorch compares in the tensor's type
        prob = prob.float()
    prob = prob.contiguous()
    fractions = None
    if isinstance(drop_fraction, torch.Tensor):
        fractions = drop_fraction.detach().to(device, torch.float32).expand(batch).contiguous()

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    where = place(device, min(batch, 1 + batch * cells // CELLS_PER_THREAD), block)
    # Both calls see these: prefix (B·L), info (3·B), member_base (B + 1), status (2).
    prefix, info, member_base, status = ints(batch * cells + 4 * batch + 3).split([batch * cells, 3 * batch, batch + 1, 2])
    cu_seqlens, overflow = ints(batch + 1), ints()
    _C.plan_count(
        prob.data_ptr(), prob.dtype == torch.float64,
        0 if fractions is None else fractions.data_ptr(), 0.0 if fractions is not None else drop_fraction, threshold,
        batch, cells, -1 if capacity is None else capacity, mode,
        prefix.data_ptr(), info.data_ptr(), member_base.data_ptr(), cu_seqlens.data_ptr(), overflow.data_ptr(),
        status.data_ptr(), where,
    )  # fmt: skip
    max_seqlen = min(cells, capacity or 0)
    if capacity is None or device.type == "cpu":
        total, longest = status.tolist()  # the one copy from the device
        if total < 0:
            reject_nan("plan_chunks", boundary_prob)
        if capacity is None:
            capacity, max_seqlen = total, longest

    token_index, sample_index, member_offsets = ints(capacity), ints(capacity), ints(capacity + 1)
    nearest_row, member_index = ints(batch * cells), ints(batch * cells)
    blocks, block = (batch, 1024) if device.type == "cuda" else (where.threads, block)
    scratch = ints(_C.scratch_ints(cells, len(grid), block) * blocks)
    _C.plan_fill(
        (*grid, 1, 1)[:3], len(grid), batch, cells, capacity, mode,
        prefix.data_ptr(), member_base.data_ptr(), cu_seqlens.data_ptr(), token_index.data_ptr(),
        sample_index.data_ptr(), nearest_row.data_ptr(), member_offsets.data_ptr(), member_index.data_ptr(),
        scratch.data_ptr(), where,
    )  # fmt: skip
    return ChunkPlan(
        grid=tuple(grid),
        batch_size=batch,
        capacity=capacity,
        max_seqlen=max_seqlen,
        cu_seqlens=cu_seqlens,
        token_index=token_index,
        sample_index=sample_index,
        nearest=nearest_row,
        member_offsets=member_offsets,
        member_index=member_index,
        overflow=overflow,
    )
