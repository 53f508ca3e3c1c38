"""Varlen adaLN: modulators (B, D) are looked up by sample and never expanded to one row per token."""

from __future__ import annotations

from typing import Any

import torch

from . import _triton_support
from ._check import all_tensors, no_plan, not_negative, require, shaped
from ._ops import Backend, Differentiable
from .cpu import _rows
from .packing import Packing

NORMS = ("layer", "rms")


def _like_x(x: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backends(op: str, kernels: str) -> dict[str, Any]:
    return {
        "native": Backend(f"dcdit_kernels.cpu.modulate:{op}", _rows.why_not),
        "triton": Backend(f"dcdit_kernels.triton.modulate:{kernels}", _triton_support.why_not),
    }


ADALN_MODULATE = Differentiable(
    "adaln_modulate",
    "Tensor x, Tensor shift, Tensor scale, Tensor? norm_weight",
    "float eps, str norm",
    _like_x,
    **_backends("adaln_modulate", "AdalnModulate"),
)
GATE_RESIDUAL = Differentiable(
    "gate_residual",
    "Tensor x, Tensor y, Tensor gate",
    "",
    _like_x,
    unread=("x",),
    **_backends("gate_residual", "GateResidual"),
)
GATE_RESIDUAL_MODULATE = Differentiable(
    "gate_residual_modulate",
    "Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, Tensor? norm_weight",
    "float eps, str norm",
    lambda **inputs: (_like_x(**inputs), _like_x(**inputs)),
    outputs=2,
    **_backends("gate_residual_modulate", "GateResidualModulate"),
)


def adaln_modulate(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    plan: Packing | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
    norm_weight: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """norm(x) · weight · (1 + scale_b) + shift_b (DiT, arXiv 2212.09748 section 3.2).

    Args:
        x: (capacity, D) packed with `plan`, any packing, or (B, L, D) dense without.
        shift, scale: (B, D), possibly views of one (B, 6·D) tensor. Where the segments of a sample have modulators of
            their own, `plan` is the packing of the segments, as `JoinedPacking.segments`, and B counts them.
        norm: "layer", (x - mean) / √(variance + eps), or "rms", x / √(mean of x² + eps).
        norm_weight: (D,), or None for a norm without weight, as DiT's.

    Returns x's shape and dtype; statistics in float32. Raises ValueError where shapes or options do not fit.
    """
    _check("adaln_modulate", plan, x, None, None, shift, scale)
    _check_norm("adaln_modulate", x, eps, norm, norm_weight)
    tensors = {"x": x, "shift": shift, "scale": scale, "norm_weight": norm_weight}
    return ADALN_MODULATE(backend, **tensors, plan=plan, eps=eps, norm=norm)


def gate_residual(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    plan: Packing | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """x + gate_b · y, in x's dtype (adaLN-Zero, arXiv 2212.09748). Shapes as in `adaln_modulate`; y as x."""
    _check("gate_residual", plan, x, y, gate, None, None)
    return GATE_RESIDUAL(backend, x=x, y=y, gate=gate, plan=plan)


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
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x', adaln_modulate(x', shift, scale, …)) with x' = gate_residual(x, y, gate), reading x and y once."""
    _check("gate_residual_modulate", plan, x, y, gate, shift, scale)
    _check_norm("gate_residual_modulate", x, eps, norm, norm_weight)
    tensors = {"x": x, "y": y, "gate": gate, "shift": shift, "scale": scale, "norm_weight": norm_weight}
    return GATE_RESIDUAL_MODULATE(backend, **tensors, plan=plan, eps=eps, norm=norm)


def _check(
    op: str,
    plan: Packing | None,
    x: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> None:
    try:
        capacity = None if plan is None else plan.capacity
    except AttributeError:
        raise no_plan(op, plan) from None
    vectors = (("gate", gate), ("shift", shift), ("scale", scale))
    try:
        shape = x.shape
        if plan is None:
            if len(shape) == 2:
                raise ValueError(
                    f"{op}: x must have shape (B, L, D) without a plan, got {tuple(shape)}: packed rows need theirs"
                )
            shaped(op, "x", x, None, None, None)
            modulators = (shape[0], shape[2])
        else:
            if len(shape) != 2 or shape[0] != capacity:
                shaped(op, "x", x, capacity, None)
            modulators = (plan.batch_size, shape[1])
        for name, tensor in vectors:
            if tensor is not None and tensor.shape != modulators:
                shaped(op, name, tensor, *modulators)
        if y is not None and y.shape != shape:
            raise ValueError(f"{op}: y must have x's shape {tuple(shape)}, got {tuple(y.shape)}")
    except (AttributeError, RuntimeError):
        others = {name: tensor for name, tensor in (("y", y), *vectors) if tensor is not None}
        all_tensors(op, x=x, **others)
        raise


def _check_norm(op: str, x: torch.Tensor, eps: float, norm: str, weight: torch.Tensor | None) -> None:
    not_negative(op, "eps", eps)
    require(norm in NORMS, "{}: norm must be one of {}, got {!r}", op, NORMS, norm)
    if weight is not None:
        shaped(op, "norm_weight", weight, x.shape[-1])
