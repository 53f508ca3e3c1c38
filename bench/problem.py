"""The problem of one case: inputs, variants with equal results, and the least work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
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
    `result` its outputs into the common one, so that all variants of a family can be compared.

    `timed` stands for `run` (and the backward pass) where a step is more than those, as with an optimiser. `around` is
    entered for `run` and the backward pass, in the gate and while timing.
    """

    run: Callable[..., Any]
    prepare: Callable[..., Tensors] = unchanged
    result: Callable[[Any], Tensors] = as_tuple
    family: str = ""
    timed: Callable[[], Any] | None = None
    around: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class Family:
    """Variants with equal results. `yardstick` names the eager one whose error sets the budget, `reference` the one
    that is the truth in float64, and in float32 sets the budget of the yardstick itself."""

    yardstick: str = "plain"
    reference: str = "reference"


@dataclass(frozen=True)
class Work:
    """The least a case has to do: bytes that must be read and written once, operations, and packed tokens.

    `moved`: the bytes that our kernels read and write, where those are more.
    """

    bytes: float
    flops: float
    tokens: int
    moved: float | None = None


@dataclass(frozen=True)
class Problem:
    """`inputs` are drawn in the dtype of the case; `reduction` is the length K of the longest sum; `backward` adds the
    gradients of the inputs.

    `absent` says why a variant cannot run here. `clock` on a GPU: "graph" for device time, replayed as a graph where
    the variant never waits for the host; "wall" for the host's clock, the clock for whole models; their
    launches are part of its time. `gflop` is per image, of a model's variants.
    """

    inputs: Tensors
    variants: dict[str, Variant]
    families: dict[str, Family]
    work: Work
    reduction: int
    backward: bool = False
    absent: dict[str, str] = field(default_factory=dict)
    clock: str = "graph"
    gflop: dict[str, float] = field(default_factory=dict)

    def only(self, names: tuple[str, ...]) -> Problem:
        """With these variants, and the yardstick and the reference of each of their families."""
        families = {self.variants[name].family for name in names if name in self.variants}
        kept = {*names, *(n for key in families for n in (self.families[key].yardstick, self.families[key].reference))}
        return replace(
            self,
            variants={name: variant for name, variant in self.variants.items() if name in kept},
            families={key: family for key, family in self.families.items() if key in families},
            absent={name: reason for name, reason in self.absent.items() if name in names},
        )
