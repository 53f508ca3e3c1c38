"""The skin over the compiled `dcdit_kernels._C`: outputs and workspace from torch, addresses and the stream to C++."""

from __future__ import annotations

import contextlib
import importlib
import math
from typing import Any

import torch

from ._autograd import KernelFunction
from ._plan_input import check_values
from ._triton_support import assume_constant, capability, elsewhere
from .chunk_plan import ChunkPlan

_C: Any
try:
    _C = importlib.import_module("dcdit_kernels._C")
    load_error: str | None = None
except ImportError as error:
    _C, load_error = None, str(error)
INTERFACE = 6  # counts changes of C++ arguments, so that a build of other sources is not called
if _C is not None and getattr(_C, "interface", 1) != INTERFACE:
    _C, load_error = None, "it was built from other sources"

# The place of a mode is its number in csrc/plan.h.
MODES = ("grid", "1d", "previous")
# Below this much a second thread costs more than it saves.
CELLS_PER_THREAD = 16384
BYTES_PER_THREAD = 1 << 20


def missing(device: torch.device) -> str | None:
    """Reason why the extension cannot run on this device, with the remedy; None where it can."""
    if _C is None:
        return (
            f"the extension dcdit_kernels._C is not built ({load_error}); `pip install .` with a C++ compiler makes it"
        )
    if device.type == "cuda":
        return _cuda_missing(device.index)
    return None if device.type == "cpu" else f"the extension runs on cpu and cuda, got {device}"


@assume_constant
def _cuda_missing(index: int | None) -> str | None:
    if not _C.cuda_archs:
        return "the extension was built without CUDA; put nvcc on PATH and run `pip install .` again"
    built, driver = _C.cuda_versions()
    if driver // 1000 < built // 1000:
        return (
            f"the extension was built with CUDA {cuda_name(built)} and the driver knows CUDA {cuda_name(driver)}; "
            "build it with an older nvcc, or renew the driver"
        )
    major, minor = capability(index)
    oldest = min(int(arch) for arch in _C.cuda_archs.split(","))
    if 10 * major + minor < oldest:
        return f"the extension was built for sm_{oldest} and newer, got sm_{major}{minor}; set DCDIT_CUDA_ARCHS"
    return None


def cuda_name(version: int) -> str:
    """13000 as "13.0"; 0, where there is none, as "none"."""
    return f"{version // 1000}.{version % 1000 // 10}" if version else "none"


def why_not(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Reason why the extension cannot run on tensors like these, or None."""
    return missing(device)


def place(device: torch.device, items: int, block: int = 1) -> Any:
    """Where a call runs: the current stream of a GPU, or CPU threads, no more than `items` are worth."""
    if device.type == "cuda":
        return _C.Place(True, torch._C._cuda_getCurrentRawStream(device.index), 0, 0)
    return _C.Place(False, 0, max(1, min(torch.get_num_threads(), items)), block)


def device_of(tensor: torch.Tensor) -> Any:
    """Guard under which a tensor's GPU is the current one."""
    return torch.cuda.device(tensor.device) if elsewhere(tensor) else contextlib.nullcontext()


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
    *,
    block: int = 1,
) -> ChunkPlan:
    """See `dcdit_kernels.plan_chunks`.

    On CUDA three launches, a block per sample; on a CPU threads over samples. Workspace in integers: B·L, with a
    capacity 2·B·L, and 2·B·L (3 for 3D) more on a GPU, 8·L (9) per thread on a CPU. Numbers outside [0, 1] are refused
    on a CPU, and on a GPU unless `capacity` is given. `exact` promises that all rows of the capacity will be live.
    `block` is for tests: threads of a sample's block on the CPU, 1 or 64.
    """
    boundary_prob = boundary_prob.detach()
    limits = capacity, max_seqlen, keep, ban, budget, budget_per_sample, exact
    with device_of(boundary_prob):
        return _plan_chunks(boundary_prob, grid, drop_fraction, threshold, nearest, *limits, block)


def _plan_chunks(
    boundary_prob, grid, drop_fraction, threshold, nearest,
    capacity, max_seqlen, keep, ban, budget, budget_per_sample, exact, block
):  # fmt: skip
    (batch, cells), device = boundary_prob.shape, boundary_prob.device
    # Euclidean distance along a single axis is the 1d distance, ties included.
    if nearest in ("2d", "3d"):
        nearest = "grid" if sum(n > 1 for n in grid) > 1 else "1d"
    mode = MODES.index(nearest)
    prob = boundary_prob
    if prob.dtype in (torch.float16, torch.bfloat16):
        # PyTorch compares in the tensor's type.
        threshold = torch.tensor(threshold, dtype=prob.dtype, device="cpu").item()
        prob = prob.float()
    prob = prob.contiguous()
    masks = [mask if mask is None else mask.contiguous() for mask in (keep, ban)]
    fractions = None
    if isinstance(drop_fraction, torch.Tensor):
        fractions = drop_fraction.detach().to(device, torch.float32).expand(batch).contiguous()
    rows = None
    if isinstance(budget_per_sample, torch.Tensor):
        rows, budget_per_sample = budget_per_sample.to(device, torch.int32).expand(batch).contiguous(), None

    where = place(device, min(batch, 1 + batch * cells // CELLS_PER_THREAD), block)
    blocks, block = (batch, 1024) if device.type == "cuda" else (where.threads, block)
    # Both calls see these integers: scratch, status (2), prefix (B·L), info (4·B), member_base (B + 1), and where rows
    # may be too few sums (B·L) and the digits of a selection.
    first = _C.scratch_ints(cells, len(grid), block) * blocks
    more = 0 if capacity is None else batch * cells + _C.digits
    shared = torch.empty(first + batch * cells + 5 * batch + 3 + more, dtype=torch.int32, device=device)
    ints, scratch = shared.new_empty, shared.data_ptr()
    status = scratch + 4 * first
    prefix = status + 4 * 2
    info = prefix + 4 * batch * cells
    member_base = info + 4 * 4 * batch
    sums = member_base + 4 * (batch + 1) if more else 0
    cu_seqlens, overflow = ints(batch + 1), ints(())
    limit = cells if max_seqlen is None else min(cells, max_seqlen)
    status_here = _C.plan_count(
        prob.data_ptr(), *(0 if mask is None else mask.data_ptr() for mask in masks), prob.dtype == torch.float64,
        0 if fractions is None else fractions.data_ptr(), 0.0 if fractions is not None else drop_fraction,
        0 if rows is None else rows.data_ptr(), *(-1 if n is None else n for n in (budget_per_sample, budget)),
        threshold, batch, cells, -1 if capacity is None else capacity, limit, mode,
        prefix, sums, info, member_base, cu_seqlens.data_ptr(), overflow.data_ptr(), status,
        where,
    )  # fmt: skip
    longest = min(limit, capacity or 0)
    if capacity is None or device.type == "cpu":
        # The one copy from the device.
        total, retained = status_here if device.type == "cpu" else shared[first : first + 2].tolist()
        if total < 0:
            check_values(boundary_prob, keep, ban, budget, budget_per_sample if rows is None else rows)
        if capacity is None:
            capacity, longest, exact = total, retained, True

    token_index, sample_index, member_offsets = ints(capacity), ints(capacity), ints(capacity + 1)
    nearest_row, member_index = ints(batch * cells), ints(batch * cells)
    _C.plan_fill(
        (*grid, 1, 1)[:3], len(grid), batch, cells, capacity, mode,
        prefix, member_base, cu_seqlens.data_ptr(), token_index.data_ptr(),
        sample_index.data_ptr(), nearest_row.data_ptr(), member_offsets.data_ptr(), member_index.data_ptr(),
        scratch, where,
    )  # fmt: skip
    return ChunkPlan.unchecked(
        grid=tuple(grid),
        batch_size=batch,
        capacity=capacity,
        max_seqlen=longest,
        cu_seqlens=cu_seqlens,
        token_index=token_index,
        sample_index=sample_index,
        nearest=nearest_row,
        member_offsets=member_offsets,
        member_index=member_index,
        overflow=overflow,
        exact=exact,
    )


def pack_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """See `dcdit_kernels.pack_rows`."""
    return _Pack.apply(x, index)


def unpack_rows(x: torch.Tensor, index: torch.Tensor, rows: int) -> torch.Tensor:
    """See `dcdit_kernels.unpack_rows`."""
    return _Unpack.apply(x, index, rows)


class _Pack(KernelFunction):
    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        out = torch.empty(index.shape[0], *x.shape[1:], dtype=x.dtype, device=x.device)
        return _move_rows("pack_rows", x, index, out, x.shape[0], False)

    @staticmethod
    def backward(ctx, grad):
        return _Unpack.apply(grad, *ctx.saved_tensors, ctx.rows), None


class _Unpack(KernelFunction):
    @staticmethod
    def forward(ctx, x, index, rows):
        ctx.save_for_backward(index)
        out = torch.zeros(rows, *x.shape[1:], dtype=x.dtype, device=x.device)
        return _move_rows("unpack_rows", x, index, out, rows, True)

    @staticmethod
    def backward(ctx, grad):
        return _Pack.apply(grad, *ctx.saved_tensors), None, None


def _move_rows(op: str, x: torch.Tensor, index: torch.Tensor, out: torch.Tensor, limit: int, scatter: bool) -> Any:
    """Rows keep their stride; elements within one must lie side by side. Moves bytes, whatever the type."""
    index = index.long().contiguous()
    x = x.resolve_conj().resolve_neg()  # views that say so without having done it
    if x.shape[0] and not x[0].is_contiguous():
        x = x.contiguous()
    size = x.element_size() * math.prod(x.shape[1:])
    where = place(x.device, 1 + index.numel() * size // BYTES_PER_THREAD)
    with device_of(x):
        _C.move_rows(
            op, x.data_ptr(), x.stride(0) * x.element_size(), index.data_ptr(), out.data_ptr(), size,
            index.numel(), size, limit, scatter, where,
        )  # fmt: skip
    return out
