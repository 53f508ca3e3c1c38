"""Argument checks shared by the public operators: each error names what was expected and what came."""

from __future__ import annotations

import torch

from .chunk_plan import ChunkPlan

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require(condition: bool, message: str, *values: object) -> None:
    """Raise ValueError(message.format(*values)) unless the condition holds.

    Values are put in only then: torch.compile cannot write a size that it does not know into a string.
    """
    if not condition:
        raise ValueError(message.format(*values))


def floating(op: str, **tensors: torch.Tensor | None) -> None:
    """Each named tensor must be floating point."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def shaped(op: str, name: str, tensor: torch.Tensor, *shape: int | None) -> None:
    """`tensor` must have this shape; None matches any size."""
    fits = tensor.dim() == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        want = "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"
        raise ValueError(f"{op}: {name} must have shape {want}, got {tuple(tensor.shape)}")


def packed(op: str, name: str, tensor: torch.Tensor, plan: ChunkPlan) -> None:
    """`tensor` must be packed features of this plan, (capacity, D)."""
    shaped(op, name, tensor, plan.capacity, None)


def reject_nan(op: str, prob: torch.Tensor) -> None:
    """Raise where a probability (B, L) is NaN, with how many there are and the first of them."""
    bad = prob.isnan()
    if bad.any():
        sample, cell = divmod(int(bad.flatten().int().argmax()), prob.shape[1])
        raise ValueError(f"{op}: boundary_prob has {int(bad.sum())} NaN, the first in sample {sample} at cell {cell}")
