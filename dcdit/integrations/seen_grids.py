"""Grids that were found in tensors before, so that the host reads each tensor once."""

from __future__ import annotations

from collections import deque

import torch

Seen = deque[tuple[torch.Tensor, int, tuple[int, ...]]]  # tensors, their changes so far, the grids found in them


def found_in(seen: Seen, tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The grid that was found in a tensor; None where it is new or was changed since."""
    changes = changes_of(tensor)
    return next((grid for known, count, grid in seen if known is tensor and count == changes), None)


def changes_of(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; torch does not count for those of inference mode."""
    return 0 if tensor.is_inference() else tensor._version
