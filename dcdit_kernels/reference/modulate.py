"""adaLN modulation and gated residual in plain PyTorch, with modulators looked up per sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..packing import Packing
from ._packed import accumulate_dtype, live_rows, take_rows


def per_row(modulator: torch.Tensor, plan: Packing | None, dtype: torch.dtype) -> torch.Tensor:
    """The modulator (B, D) of each row in `dtype`: (capacity, D) packed, or (B, 1, D) for a dense batch.

    The cast comes first, so that the gradient's sum over a sample's rows is in `dtype` too.
    """
    modulator = modulator.to(dtype)
    return modulator[:, None] if plan is None else take_rows(modulator, plan.sample_index)


def adaln_modulate(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    plan: Packing | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
    norm_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `dcdit_kernels.adaln_modulate`."""
    dtype = accumulate_dtype(x)
    rows, weight = _live(x, plan).to(dtype), None if norm_weight is None else norm_weight.to(dtype)
    normed = (F.rms_norm if norm == "rms" else F.layer_norm)(rows, x.shape[-1:], weight, eps=eps)
    out = normed * (1 + per_row(scale, plan, dtype)) + per_row(shift, plan, dtype)
    return _live(out, plan).to(x.dtype)


def gate_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, plan: Packing | None = None) -> torch.Tensor:
    """See `dcdit_kernels.gate_residual`."""
    dtype = accumulate_dtype(x, y)
    out = _live(x, plan).to(dtype) + per_row(gate, plan, dtype) * _live(y, plan).to(dtype)
    return out.to(x.dtype)


def gate_residual_modulate(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    plan: Packing | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
    norm_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `dcdit_kernels.gate_residual_modulate`."""
    x = gate_residual(x, y, gate, plan)
    return x, adaln_modulate(x, shift, scale, plan, eps, norm, norm_weight)


def _live(x: torch.Tensor, plan: Packing | None) -> torch.Tensor:
    return x if plan is None else torch.where(live_rows(plan), x, 0.0)
