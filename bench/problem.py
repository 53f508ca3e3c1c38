"""What one case measures: inputs, the variants that compute the same from them, and the work that has to be done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Tensors = tuple[torch.Tensor, ...]


def as_tuple(out: torch.Tensor | Tensors) -> Tensors:
    """An operator's result as a tuple."""
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


def unchanged(*inputs: torch.Tensor) -> Tensors:
    return inputs


@dataclass(frozen=True)
class Variant:
    """One way to compute a case. Only `run` is timed: `prepare` brings the case's inputs into its own layout and
    `result` its outputs into the common one, so that all variants can be compared."""

    run: Callable[..., Any]
    prepare: Callable[..., Tensors] = unchanged
    result: Callable[[Any], Tensors] = as_tuple


@dataclass(frozen=True)
class Work:
    """The least a case has to do: bytes that must be read and written once, operations, and packed tokens."""

    bytes: float
    flops: float
    tokens: int


@dataclass(frozen=True)
class Problem:
    """`inputs` are drawn in the dtype of the case. `oracle` takes them in float64; `yardstick` names the eager variant
    whose error sets the budget, `reference` the one that sets the budget of the yardstick itself.

    `reduction` is the length K of the longest sum. `absent` says why a variant cannot run here. `wall`: the host's
    clock is the one that counts, as for a whole model, whose launches are part of its time. `forward_flops` gives
    GFLOP per image of the variants where they differ.
    """

    inputs: Tensors
    variants: dict[str, Variant]
    oracle: Variant
    work: Work
    reduction: int
    yardstick: str = "plain"
    reference: str = "reference"
    absent: dict[str, str] = field(default_factory=dict)
    wall: bool = False
    flops_of: dict[str, float] = field(default_factory=dict)
