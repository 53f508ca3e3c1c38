"""Row helpers of the CPU back-end. Reading a count from a CPU tensor synchronises with nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..chunk_plan import ChunkPlan


def why_not(*args: Any, **kwargs: Any) -> str | None:
    """Reason why the CPU back-end cannot take these arguments: their first tensor lies elsewhere."""
    device = next(a.device for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
    return None if device.type == "cpu" else f"this formulation is for CPU tensors, got {device}"


def live_count(plan: ChunkPlan) -> int:
    """Rows that hold a token; the rest of the capacity is zero."""
    return int(plan.cu_seqlens[-1])


def segment_sum(rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """out[i] = Σ rows[j] for offsets[i] ≤ j < offsets[i + 1]; (N, D) → (len(offsets) - 1, D), in a fixed order."""
    used = torch.arange(int(offsets[-1]), dtype=offsets.dtype)
    if used.numel() == 0:
        return rows.new_zeros(len(offsets) - 1, rows.shape[1])
    return F.embedding_bag(used, rows.contiguous(), offsets, mode="sum", include_last_offset=True)


def with_tail(live_rows: torch.Tensor, capacity: int) -> torch.Tensor:
    """`live_rows` (N, …), followed by zero rows up to `capacity`."""
    tail = capacity - live_rows.shape[0]
    return live_rows if tail == 0 else torch.cat([live_rows, live_rows.new_zeros(tail, *live_rows.shape[1:])])
