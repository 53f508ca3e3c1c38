"""The checks of a packing that somebody made or edited by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ._check import require, shaped, traced


class Rule(NamedTuple):
    """A rule of one tensor of a packing: whether each element `holds` it, and the `expected` value in words."""

    tensor: str
    holds: torch.Tensor
    expected: str


def check_tensors(packing: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Each named tensor has its shape, is contiguous, int32 (an index of PyTorch's own: int64), on one device."""
    kind, device = type(packing).__name__, packing.cu_seqlens.device
    for name, shape in shapes.items():
        tensor = getattr(packing, name)
        shaped(kind, name, tensor, *shape)
        dtype = "int64" if name in packing.INT64 else "int32"
        if tensor.dtype != getattr(torch, dtype):
            raise TypeError(f"{kind}: {name} must be {dtype}, got {tensor.dtype}")
        at = tensor.device
        require(at == device, "{}: {} must be on {} as cu_seqlens is, got {}", kind, name, device, at)
        require(tensor.is_contiguous(), "{}: {} must be contiguous, got strides {}", kind, name, tensor.stride())


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values can be looked at: not inside a graph, nor on the meta device."""
    return not traced(tensor) and not tensor.is_meta


def check_rules(packing: Any, rules: Sequence[Rule]) -> None:
    """Raise ValueError for the first rule that does not hold. One copy from the device finds it."""
    held = torch.stack([rule.holds.all() for rule in rules]).tolist()
    for (name, holds, expected), good in zip(rules, held, strict=True):
        if not good:
            place = int(holds.flatten().int().argmin())
            value = getattr(packing, name).flatten()[place].item()
            raise ValueError(f"{type(packing).__name__}: {name}[{place}] must be {expected}, got {value}")
